"""Fine-tune a Parakeet model: runs `parakeet finetune` as a script, for `torchrun` and `accelerate launch`.

`python examples/finetune.py --help` lists the options; the code is in `transformers_parakeet/training/finetune.py`.
"""

from transformers_parakeet.training import finetune_main

if __name__ == "__main__":
    finetune_main()

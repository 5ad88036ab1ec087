"""Fine-tune a Parakeet model: the same program as `parakeet finetune`, for `torchrun` and `accelerate launch`.

`python examples/finetune.py --help` lists the options; the program is in `transformers_parakeet/training/finetune.py`.
"""

from transformers_parakeet.training import finetune_main

if __name__ == "__main__":
    finetune_main()

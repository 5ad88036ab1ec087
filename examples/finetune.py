"""Fine-tune a Parakeet model: what `parakeet finetune` does, for `torchrun` and `accelerate launch`.

All of it is in `transformers_parakeet.training.finetune`; `python examples/finetune.py --help` lists the options.
"""

from transformers_parakeet.training import finetune_main

if __name__ == "__main__":
    finetune_main()

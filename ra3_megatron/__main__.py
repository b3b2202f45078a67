"""`python -m ra3_megatron` is the command `ra3`, for launchers that take a module."""

from ra3_megatron.cli import main

if __name__ == "__main__":
    # The guard matters: checkpoint writers spawn processes that import this module again.
    main()

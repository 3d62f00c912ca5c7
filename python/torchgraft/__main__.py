"""`python -m torchgraft` is the command `torchgraft`; so `torchrun -m torchgraft train ...` is."""

from torchgraft_command.main import run

if __name__ == "__main__":
    run()

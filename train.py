"""The command `slam-train` in a checkout; `python train.py --help` explains it."""

from slam_jax.commands import train

if __name__ == "__main__":
    train()

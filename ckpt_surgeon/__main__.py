"""python -m ckpt_surgeon"""

from .cli import main

if __name__ == "__main__":
    main(several=True)

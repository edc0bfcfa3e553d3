"""`python -m dense2moe`: the command line."""

from dense2moe.convert.cli import main

if __name__ == "__main__":
    main(prog_name="dense2moe")

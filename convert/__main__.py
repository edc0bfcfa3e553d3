"""`python -m convert`: the command line without its installed name."""

from convert.cli import main

if __name__ == "__main__":
    main(prog_name="dense2moe")

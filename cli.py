"""In a checkout `python cli.py train` is what `miniconvit train` is once installed."""

from miniconvit.cli import main

if __name__ == "__main__":
    main(name="python cli.py")

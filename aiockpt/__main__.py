"""`python -m aiockpt` is `aiockpt`."""

from aiockpt.cli import main

if __name__ == "__main__":
    main()

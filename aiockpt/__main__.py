"""`python -m aiockpt` is `aiockpt`."""

from aiockpt.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()

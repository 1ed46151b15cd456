"""The command line: `python -m manifoldflow`, and `walk` for data of one's own."""

import sys

from manifoldflow._command import main

if __name__ == "__main__":
    sys.exit(main())

import sys

from megakrause.cli import main

sys.exit(main())

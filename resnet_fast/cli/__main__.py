import sys

from resnet_fast.cli import main

sys.exit(main())

import sys

from step_kernels.bench import main

sys.exit(main())

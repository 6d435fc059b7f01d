"""What holds for every lane."""

import os
import tempfile

# Choices of algorithms that the user has measured would make the tests see other kernels on every machine.
_cache = tempfile.TemporaryDirectory(prefix="resnet_fast-tests-")
os.environ["RESNET_FAST_CACHE"] = _cache.name

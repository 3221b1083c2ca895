"""mosaicml-streaming, the peer, where torchvision is missing or does not load, as with a CPU build of torch."""

import importlib.machinery
import sys
from types import ModuleType


def stand_in_for_torchvision() -> None:
    """Call it before `import streaming`, which takes two names of torchvision, for images, which no row here is."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        pass
    else:
        return
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]

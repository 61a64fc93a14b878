"""Frees what building a graph leaves behind: references that onnxscript keeps, and pages that the C library keeps."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_memory() -> None:
    """Free all memory that nothing refers to any more, and return it to the operating system where that is possible.

    onnxscript's rewrite rules live as long as the process, and the matcher of each keeps the last graph that it was
    tried on, with all its weights: the matchers forget it. So do torch's maps and caches of the last program
    that was exported. Afterwards the garbage collector runs, and glibc, on Linux, is asked for the pages that it holds.
    """
    _forget_graphs()
    _forget_programs()
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return freed pages to the operating system: glibc, on Linux, holds them in reserve."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)


def _forget_graphs() -> None:
    """Bring every matcher of onnxscript's rules back into the state that its constructor left."""
    library = sys.modules.get("onnxscript.rewriter._matcher")
    kind = getattr(library, "PatternMatcher", None)
    if kind is None:
        return  # nothing has been rewritten
    matchers = [found for found in gc.get_objects() if issubclass(type(found), kind)]  # isinstance wakes lazy modules
    for matcher in matchers:
        fresh = vars(type(matcher)(matcher.pattern))
        vars(matcher).clear()
        vars(matcher).update(fresh)


def _forget_programs() -> None:
    """Empty what torch keeps of an exported program: a map of its nodes, and caches of its symbolic shapes."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    getattr(proxies, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
    shapes = getattr(sys.modules.get("torch.fx.experimental.symbolic_shapes"), "ShapeEnv", object)
    for method in vars(shapes).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()
    rng = sys.modules.get("torch._decomp.decompositions_for_rng")
    tracker = getattr(rng, "PhiloxStateTracker", None)
    if tracker is not None and hasattr(tracker, "running_state"):
        tracker.reset()

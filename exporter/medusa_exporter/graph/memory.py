"""Frees memory that building a graph leaves behind: references kept by onnxscript and torch, and free heap pages."""

from __future__ import annotations

import gc
import sys

from medusa_runtime.heap import trim_heap


def release_memory() -> None:
    """Free all unreferenced memory and return it to the operating system if possible.

    onnxscript's rewrite rules live as long as the process, and the matcher of each keeps the last graph that it was
    tried on, with all weights; the matchers are reset. torch keeps maps and caches of the last program that was
    exported; they are emptied. Then the garbage collector runs, and on Linux glibc returns its free pages.
    """
    _reset_matchers()
    _clear_torch_caches()
    gc.collect()
    trim_heap()


def _reset_matchers() -> None:
    """Reset every matcher of onnxscript's rules to the state after its constructor."""
    library = sys.modules.get("onnxscript.rewriter._matcher")
    matcher_class = getattr(library, "PatternMatcher", None)
    if matcher_class is None:
        return  # nothing has been rewritten
    # issubclass of the type: isinstance would import lazy modules
    matchers = [one for one in gc.get_objects() if issubclass(type(one), matcher_class)]
    for matcher in matchers:
        fresh = vars(type(matcher)(matcher.pattern))
        vars(matcher).clear()
        vars(matcher).update(fresh)


def _clear_torch_caches() -> None:
    """Empty torch's map of an exported program's nodes and its caches of symbolic shapes."""
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

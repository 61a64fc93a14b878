"""`medusa-export profiles`: list the trees that come with medusa-export, or draw one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from medusa_profiles import TreeProfile, draw_tree, load_profile, profile_names
from medusa_profiles.catalogue import profile_from_file

from medusa_exporter.cli.command import Command
from medusa_exporter.cli.results import Results, json_option
from medusa_exporter.console import table
from medusa_exporter.output_kinds import SUMMARIES

HEADINGS = ("name", "nodes", "depth", "max rank", "source")
KIND = SUMMARIES["profiles"]


@click.command(name="profiles", cls=Command, example="medusa-export profiles tree-8")
@click.argument("name", required=False)
@json_option("the trees")
def command(name: str | None, results: Results) -> None:
    """List the trees that come with medusa-export, or draw the tree called NAME.

    A NAME that ends in .toml is the path of a file with a tree. `nodes` includes the root; `depth` is the number of
    heads that the tree needs; `max rank` is the lowest-ranked candidate of a head that it uses, counted from 0.
    """
    results.check(KIND, inputs=[] if name is None else [Path(name)])
    if name is None:
        profiles = [load_profile(shipped) for shipped in profile_names()]
        results.write(KIND, {"profiles": [_facts(profile) for profile in profiles]})
        rows = [[str(value) for value in _facts(profile).values()] for profile in profiles]
        results.echo(table(HEADINGS, rows, text=("name", "source")))
        return
    profile = profile_from_file(name) or load_profile(name)
    results.write(KIND, _facts(profile) | {"candidates": profile.candidates, "paths": list(map(list, profile.paths))})
    results.echo("\n".join([draw_tree(profile), *filter(None, [profile.source])]))


def _facts(profile: TreeProfile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "nodes": profile.size,
        "depth": profile.depth,
        "max_rank": profile.max_rank,
        "source": profile.source,
    }

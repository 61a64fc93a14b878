"""`medusa-export profiles`: list the shipped trees, or draw one."""

from __future__ import annotations

import json
from typing import Any

import click
from medusa_profiles import TreeProfile, draw_tree, load_profile, load_profile_file, profile_names

HEADER = ("name", "nodes", "depth", "max rank", "source")


@click.command(name="profiles")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(name: str | None, as_json: bool) -> None:
    """List the shipped trees, or draw the one called NAME (or the one in the file NAME, if it ends in .toml).

    `nodes` counts the root; `depth` is the number of heads needed; ranks start at 0.
    """
    if name is None:
        profiles = [load_profile(shipped) for shipped in profile_names()]
        click.echo(_json([_facts(profile) for profile in profiles]) if as_json else _table(profiles))
        return
    profile = load_profile_file(name) if name.endswith(".toml") else load_profile(name)
    if as_json:
        click.echo(_json(_facts(profile) | {"paths": profile.paths}))
    else:
        click.echo("\n".join([draw_tree(profile), *filter(None, [profile.source])]))


def _facts(profile: TreeProfile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "nodes": profile.size,
        "depth": profile.depth,
        "max_rank": profile.max_rank,
        "source": profile.source,
    }


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _table(profiles: list[TreeProfile]) -> str:
    """Return one aligned line a profile below a header: names to the left, numbers to the right, source last."""
    rows = [HEADER, *(tuple(map(str, _facts(profile).values())) for profile in profiles)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]) for row in rows
    )

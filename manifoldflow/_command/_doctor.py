"""First aid: what this installation is, what is wrong with it, and what to do about it."""

import argparse
from collections.abc import Callable, Mapping

from manifoldflow._command._finding import Finding
from manifoldflow._command._machine import devices, precision, programs, threads
from manifoldflow._command._trials import factorisations, self_test
from manifoldflow._command._versions import versions
from manifoldflow._command._waiting import Waiting

SECTIONS: Mapping[str, Callable[[], list[Finding]]] = {
    "Versions": versions,
    "Devices": devices,
    "Precision": precision,
    "Threads": threads,
    "Compiled programs": programs,
    "Factorisations": factorisations,
    "Self-test": self_test,
}


def run(options: argparse.Namespace) -> int:
    """Print the report, in Markdown; 1 if something is wrong, else 0."""
    del options
    with Waiting("examining"):
        found = {name: section() for name, section in SECTIONS.items()}
    print(written(found))
    return int(any(finding.is_wrong for findings in found.values() for finding in findings))


def written(found: Mapping[str, list[Finding]]) -> str:
    """The report as it can be pasted: a heading with the verdict, and a list for each section."""
    wrong = sum(finding.is_wrong for findings in found.values() for finding in findings)
    verdict = "nothing is wrong" if not wrong else f"{wrong} wrong"
    blocks = [f"### manifoldflow doctor: {verdict}"]
    for name, findings in found.items():
        blocks.append("\n".join([f"**{name}**", "", *map(str, findings)]))
    return "\n\n".join(blocks)

"""sbom.json: what the package needs, contains and is made with, as CycloneDX.

    python hub/sbom.py --write

From pyproject.toml and constraints.txt. What users have is theirs: of torch and rich, which pip
brings, the file names the range that is accepted; the versions in it are those of the tests.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SBOM = ROOT / "sbom.json"
CUDART = {
    "type": "library",
    "bom-ref": "cudart_static",
    "name": "cudart_static",
    "scope": "optional",
    "description": "NVIDIA's CUDA runtime, linked into builds with CUDA kernels: the toolkit's",
}


def component(name: str, version: str, scope: str) -> dict[str, Any]:
    ref = f"pkg:pypi/{name.lower().replace('_', '-')}"
    found = {"type": "library", "bom-ref": ref, "name": name, "scope": scope, "purl": ref}
    if version:
        found |= {"version": version, "purl": f"{ref}@{version}"}
    return found


def sbom() -> str:
    """The file's text."""
    project = (ROOT / "pyproject.toml").read_text()

    def of(key: str) -> str:
        return re.findall(rf'^{key} = "(.+)"', project, re.MULTILINE)[0]

    needed = re.findall(r'"([\w.-]+)([^"]*)"', of_list(project, "dependencies"))
    runtime = [
        component(name, "", "required") | {"description": f"accepted: {accepted}"}
        for name, accepted in needed
    ]
    names = {name for name, _ in needed}
    lock = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    tools = [component(name, v, "excluded") for name, v in lock if name.lower() not in names]
    own = component(of("name"), of("version"), "required")
    del own["purl"]  # it is nobody's until it is published
    own["licenses"] = [{"license": {"id": of("license")}}]
    root = {"ref": own["bom-ref"], "dependsOn": [c["bom-ref"] for c in runtime]}
    found = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own},
        "components": [*runtime, CUDART, *tools],
        "dependencies": [root],
    }
    return json.dumps(found, indent=1) + "\n"


def of_list(project: str, key: str) -> str:
    return re.findall(rf"^{key} = \[(.*)\]", project, re.MULTILINE)[0]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        SBOM.write_text(sbom())
    else:
        print(sbom(), end="")

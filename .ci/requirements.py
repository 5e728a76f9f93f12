"""Prints what an extra of attnx requires, without attnx itself, which would have to be built: requirements.py EXTRA"""

import re
import sys
from pathlib import Path

import tomllib

extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
pending = sys.argv[1:]
while pending:
    for requirement in extras[pending.pop()]:
        if own := re.fullmatch(r"attnx\[(.+)\]", requirement):
            pending.append(own[1])
        else:
            print(requirement)

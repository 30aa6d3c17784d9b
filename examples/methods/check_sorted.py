"""A checker for execution.yaml: exit code 0 if the completion is the right answer. Uses only the standard library.

python check_sorted.py completion.txt prompt.json
"""

import json
import sys

completion, prompt = sys.argv[1:]
with open(completion, encoding="utf-8") as text, open(prompt, encoding="utf-8") as row:
    sys.exit(0 if text.read().strip() == json.load(row)["answer"] else 1)

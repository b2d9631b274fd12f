#!/usr/bin/env bash
# Build the documentation site into out/docs/site; a link that leads nowhere ends it with an error.
# Usage: scripts/docs.sh PYTHON
set -euo pipefail
python=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Pages lie beside the code that they link to: the site has the repository's own tree, without
# what no page can show.
rm -rf out/docs
mkdir -p out/docs/source
git ls-files --cached --others --exclude-standard -z |
    grep -zvE '^(tests/|\.|examples/.*/checkpoint/)' |
    xargs -0 cp --parents -t out/docs/source
NO_MKDOCS_2_WARNING=1 "$python" -m mkdocs build --strict --config-file scripts/mkdocs.yml
echo "out/docs/site/index.html"

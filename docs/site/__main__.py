"""`python -m docs.site`: rewrites the generated parts of the pages."""

from docs.site.generated import main

main()

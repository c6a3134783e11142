"""MkDocs hook: links that leave docs/ lead to the repository, or become plain text without one."""

import posixpath
import re

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Rewrites ``[text](../FILE)``: the pages are read on a code host as well."""
    folder = posixpath.dirname(page.file.src_uri)

    def rewrite(match: re.Match) -> str:
        text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return match[0]
        if not config.repo_url:
            return text
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor or ''})"

    return LINK.sub(rewrite, markdown)

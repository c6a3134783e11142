"""MkDocs hook: links that leave docs/ lead to the repository, or become plain text without one."""

import re

LINK = re.compile(r"(!?)\[([^\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Rewrites ``[text](../FILE)``: the pages are read on a code host as well."""

    def rewrite(match: re.Match) -> str:
        _, text, target, anchor = match.groups()
        if not config.repo_url:
            return text
        path = target.removeprefix("../")
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor or ''})"

    return LINK.sub(rewrite, markdown)

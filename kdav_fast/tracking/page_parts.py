"""What the parts of a report's page have in common."""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def plain(text: str) -> str:
    """Matplotlib reads `$` as mathematics and hides legend entries that start with an underscore."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text

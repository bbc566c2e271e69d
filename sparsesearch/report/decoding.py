"""The report's table of what heads do while decoding."""

from html import escape

from sparsesearch.decoding import decode_shares
from sparsesearch.plan import Plan


def decoding_table(plan: Plan, length_tokens: int) -> str:
    """Rules, their heads, and the shares of keys that these keep and read; empty where decoding follows the prefill's rules alone."""
    shares = decode_shares(plan, length_tokens)
    if not shares:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(share.rule)}</th><td>{share.heads}</td><td>{100 * share.kept:.1f} %</td>'
        f"<td>{100 * share.read:.1f} %</td></tr>"
        for share in shares
    )
    names = ("rule", "query heads", "keys kept", "keys read per token")
    head = "".join(f"<th scope='col'>{name}</th>" for name in names)
    note = f"Behind a prompt of {length_tokens} tokens; what chooses for every token reads at most so much, and each head for itself."
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="soft">{note}</p>'
    )

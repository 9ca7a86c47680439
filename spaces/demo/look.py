"""How the page looks: theme, head, and the bars of next tokens. The rest is in `style.css`."""

import gradio as gr
from report import Report, plain

# Fonts of the visitor's own system: nothing is fetched
_SANS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
_TEAL = gr.themes.Color(
    "#eefaf6",
    "#d3f2e8",
    "#a8e4d3",
    "#72cfb9",
    "#3fb39c",
    "#1f9682",
    "#0f7a6a",
    "#0e6256",
    "#0f4e46",
    "#10403a",
    "#062521",
)

THEME = gr.themes.Base(
    primary_hue=_TEAL,
    secondary_hue=_TEAL,
    neutral_hue="stone",
    font=_SANS,
    font_mono=_MONO,
    radius_size="md",
    spacing_size="md",
).set(
    body_background_fill="#faf8f4",
    body_background_fill_dark="#171614",
    block_background_fill="#ffffff",
    block_background_fill_dark="#211f1d",
    block_border_color="#e4dfd6",
    block_border_color_dark="#3a3632",
    block_label_background_fill="transparent",
    block_label_background_fill_dark="transparent",
    input_background_fill="#ffffff",
    input_background_fill_dark="#1b1a18",
    button_primary_background_fill="#0f7a6a",
    button_primary_background_fill_hover="#0e6256",
    button_primary_background_fill_dark="#0f7a6a",
    button_primary_background_fill_hover_dark="#0c6b5d",
    button_primary_text_color="#ffffff",
    button_primary_text_color_dark="#ffffff",
)


def page_head(report: Report, model: str) -> str:
    """Head of the page: what was trained, from what, by which paper, and what came of it."""
    facts = [plain(model)] if model and report.title else []
    facts += [f"trained from {plain(report.base_model)}"] if report.base_model else []
    facts += [f"on {plain(report.data)}"] if report.data else []
    papers = "".join(
        f'<a href="https://arxiv.org/abs/{plain(method.paper_id)}" target="_blank" rel="noopener">'
        f"{plain(method.paper_title)}</a>"
        for method in report.methods
        if method.paper_id
    )
    return (
        '<header class="head"><div class="headline"><p class="eyebrow">Base and trained model, side by side</p>'
        f"<h1>{plain(report.title or model or 'papertrl')}</h1>"
        f'<p class="subject">{" · ".join(facts)}</p><p class="papers">{papers}</p></div>{_scores(report)}</header>'
    )


def _scores(report: Report) -> str:
    if report.scores is None:
        return ""
    measure, before, after, prompts = report.scores
    count = f", {int(prompts)} prompts" if prompts else ""
    return (
        f'<div class="scores"><span class="measure">Held-out {plain(measure)}{count}</span>'
        f'<span class="number before">{before:.2f}</span><span class="arrow" aria-label="became">→</span>'
        f'<span class="number after">{after:.2f}</span></div>'
    )


def token_bars(prefix: str, rows: list[tuple[str, list[float]]], scale: float) -> str:
    """Probabilities of likely tokens after `prefix`, under base model, trained model, and mixture."""
    lines = []
    for token, (base, trained, guided) in rows:
        shown = plain(_visible(token)) or "end"
        bars = "".join(
            f'<div class="bar {kind}" title="{kind}: {value:.1%}"><i style="width:{100 * value:.1f}%"></i>'
            f"<span>{value:.0%}</span></div>"
            for kind, value in (("base", base), ("trained", trained), ("guided", guided))
        )
        lines.append(f'<div class="next"><code>{shown}</code><div>{bars}</div></div>')
    key = "".join(
        f'<span class="key {kind}">{label}</span>'
        for kind, label in (("base", "base"), ("trained", "trained"), ("guided", f"w = {scale:g}"))
    )
    place = f"after <code>{plain(_visible(prefix))}</code>" if prefix else "at the start of the answer"
    return f'<p class="place">{place}</p><div class="keys">{key}</div><div class="tokens">{"".join(lines)}</div>'


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace(" ", "␣")

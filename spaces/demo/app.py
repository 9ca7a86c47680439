"""Try a trained model beside its base: `python app.py --model FOLDER_OR_HUB_ID [--base_model ...] [--port ...]`."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import gradio as gr  # noqa: E402
from engine import (  # noqa: E402
    FRAME,
    LONGEST_PROMPT,
    Answer,
    Engine,
    Settings,
    Unavailable,
    load,
    next_tokens,
    parting,
    stream,
    together,
)
from look import THEME, page_head, token_bars  # noqa: E402
from report import (  # noqa: E402
    Report,
    chip_labels,
    curve_table,
    curve_title,
    first_curves,
    plain,
    read_report,
    rows_html,
    samples_html,
)

SETTINGS_FILE = "space.json"
PLOTS = 6
# Two visitors at once; further ones wait in the queue
AT_ONCE = 2
WAITING = 32
GUIDANCE_PAPER = "arXiv:2508.21016"
EMPTY = "Write a prompt first."
TOO_LONG = f"The prompt is longer than {LONGEST_PROMPT:,} characters, the most that this page takes. Shorten it."
# The page takes no files
LARGEST_UPLOAD = "1mb"
# Where the answers are below the edge of the screen, as on a phone, they are brought into view
SHOW_ANSWERS = """() => {{
  const answers = document.getElementById("{name}-answers");
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (answers && answers.getBoundingClientRect().top > 0.6 * innerHeight)
    answers.scrollIntoView({{behavior: still ? "auto" : "smooth", block: "start"}});
}}"""


@dataclass
class Page:
    """What the page is built from: an engine, or the reason why there is none, and what is known of the run."""

    engine: Engine | None
    problem: str
    report: Report
    model: str


def open_page(model: str | None, base_model: str | None = None, run: dict[str, Any] | None = None) -> Page:
    """Load what there is; a missing model becomes a page that says so."""
    if not model:
        return Page(None, "No model is set.", read_report(None, run), "")
    try:
        engine = load(model, base_model, run)
    except Unavailable as error:
        return Page(None, str(error), read_report(None, run), model)
    return Page(engine, "", read_report(engine.folder, run), engine.trained.name)


# --- What the buttons do --------------------------------------------------------------------------------------------


def notice(text: str, kind: str = "note") -> str:
    """A line above the answers; nothing where there is nothing to say."""
    return f'<p class="notice {kind}" role="status">{plain(text)}</p>' if text else ""


def refusal(prompt: str | None) -> str:
    """Why a prompt is not answered; empty if it is."""
    if not (prompt or "").strip():
        return EMPTY
    return TOO_LONG if len(prompt) > LONGEST_PROMPT else ""


def statistics(answer: Answer) -> str:
    """Length and speed of an answer."""
    if not answer.ids:
        return '<p class="stats">ended at once, without a token</p>' if answer.finished else '<p class="stats">…</p>'
    rate = len(answer.ids) / max(answer.seconds, 1e-9)
    parts = [f"{len(answer.ids)} token{'s' * (len(answer.ids) > 1)}", f"{rate:.0f} tokens/s"]
    if answer.divergences:
        base, trained = (sum(column) / len(answer.divergences) for column in zip(*answer.divergences, strict=True))
        parts.append(f"{base:.2f} nats from base, {trained:.2f} from trained, per token")
    return f'<p class="stats{"" if answer.finished else " live"}">{" · ".join(parts)}</p>'


def pause() -> None:
    """Let what a stopped answer has already sent arrive."""
    time.sleep(4 * FRAME)


def stopped(*figures: str) -> list[str] | str:
    """Statistics of answers that were stopped: no longer live."""
    settled = [(text or "").replace("stats live", "stats") for text in figures]
    return settled if len(settled) > 1 else settled[0]


def cut_notice(cut: int) -> str:
    """What to say of a prompt that did not fit."""
    return f"The prompt is too long for the model: its beginning was left out ({cut:,} tokens or more)." if cut else ""


def answering(run: Callable[[Settings], Iterator[list[Answer]]], sides: int) -> Callable:
    """
    Event handler that streams the answers of `run`.

    Args:
        run (`Callable`):
            Takes prompt, further inputs, and settings.
        sides (`int`):
            Answers at a time.
    """

    def handler(prompt, *inputs):
        *inputs, length, temperature, top_p, seed, chat = inputs
        blank = [""] * 2 * sides
        if refused := refusal(prompt):
            yield [notice(refused, "warn"), *blank]
            return
        settings = Settings(int(length), temperature, top_p, int(seed or 0), bool(chat))
        try:
            for answers in run(prompt, *inputs, settings):
                cut = cut_notice(max(answer.cut for answer in answers))
                yield [notice(cut), *(part for a in answers for part in (a.text, statistics(a)))]
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            yield [notice(f"The model could not answer: {reason}. Try a shorter prompt.", "warn"), *blank]

    return handler


def compare_with(engine: Engine) -> Callable:
    """Handler of the button that asks both models."""

    def run(prompt: str, settings: Settings) -> Iterator[list[Answer]]:
        sides = ([(engine.base, 0.0)] if engine.base else []) + [(engine.trained, 1.0)]
        return together([stream(engine, side, prompt, scale, settings) for side, scale in sides])

    return answering(run, 2 if engine.base else 1)


def guide_with(engine: Engine) -> Callable:
    """Handler of the button that asks the mixture."""

    def run(prompt: str, scale: float, settings: Settings) -> Iterator[list[Answer]]:
        return together([stream(engine, engine.trained, prompt, round(scale, 4), settings)])

    return answering(run, 1)


def bars_with(engine: Engine) -> Callable:
    """Handler that shows the next token where the two models differ most."""

    def handler(prompt: str, scale: float, chat: bool) -> str:
        if refused := refusal(prompt):
            return notice(refused)
        place = parting(engine, prompt, bool(chat))
        return token_bars(place.prefix, next_tokens(engine, place, round(scale, 4)), scale)

    return handler


# --- Tabs -----------------------------------------------------------------------------------------------------------


def settings_panel(engine: Engine, longest: int = 512) -> list[gr.components.Component]:
    """Generation settings, folded away."""
    room = max(min(longest, engine.trained.limit // 2), 1)
    with gr.Accordion("Generation settings", open=False, elem_classes="settings"), gr.Row():
        length = gr.Slider(1, room, min(128, room), step=1, label="Longest answer, tokens", min_width=200)
        temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 is greedy", min_width=200)
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", min_width=200)
        seed = gr.Number(0, label="Seed", precision=0, min_width=120)
        chat = gr.Checkbox(
            engine.trained.chats, label="As a chat message", visible=engine.trained.chats, min_width=160
        )
    return [length, temperature, top_p, seed, chat]


def prompt_panel(page: Page, name: str) -> gr.Textbox:
    """Where a prompt is typed, with examples from the run."""
    prompts = page.report.prompts[:6]
    prompt = gr.Textbox(
        value=prompts[0] if prompts else "",
        label="Prompt",
        placeholder="What shall the model go on from?",
        lines=2,
        max_lines=8,
        max_length=LONGEST_PROMPT,
        elem_id=f"{name}-prompt",
        elem_classes="prompt",
    )
    if len(prompts) > 1:
        gr.Examples(
            [[text] for text in prompts],
            prompt,
            label="From the run",
            elem_id=f"{name}-examples",
            example_labels=chip_labels(prompts),
        )
    return prompt


def answer_panel(label: str, who: str, kind: str) -> tuple[gr.Textbox, gr.HTML]:
    """Where an answer appears."""
    with gr.Column(elem_classes=["answer", kind], min_width=280):
        gr.HTML(f'<p class="who"><b>{plain(label)}</b> <span>{plain(who)}</span></p>')
        text = gr.Textbox(
            label=label,
            show_label=False,
            container=False,
            lines=4,
            max_lines=24,
            interactive=False,
            buttons=["copy"],
            placeholder="The answer appears here.",
            elem_id=f"answer-{kind}",
        )
        return text, gr.HTML('<p class="stats">&nbsp;</p>', elem_id=f"stats-{kind}")


def buttons(name: str, label: str) -> tuple[gr.Button, gr.Button]:
    """The one that starts and the one that stops."""
    with gr.Row(elem_classes="actions"):
        start = gr.Button(label, variant="primary", elem_id=f"{name}-start", min_width=140)
        stop = gr.Button("Stop", variant="secondary", elem_id=f"{name}-stop", min_width=90)
    return start, stop


def wire(
    name: str, start: gr.Button, stop: gr.Button, prompt: gr.Textbox, handler: Callable, inputs: list, outputs: list
) -> None:
    """Both ways to start, and the one to stop."""
    starts = [start.click, prompt.submit]
    gr.on(starts, None, None, None, js=SHOW_ANSWERS.format(name=name), api_visibility="private")
    event = gr.on(
        starts,
        handler,
        [prompt, *inputs],
        outputs,
        show_progress="hidden",
        concurrency_limit=AT_ONCE,
        concurrency_id="answers",
    )
    figures = [output for output in outputs[1:] if isinstance(output, gr.HTML)]
    quietly = {"queue": False, "show_progress": "hidden"}
    stop.click(pause, None, None, cancels=[event], **quietly).then(stopped, figures, figures, **quietly)


def compare_tab(page: Page) -> gr.Textbox:
    """Both answers to one prompt, which is returned."""
    engine = page.engine
    gr.HTML('<p class="lead">One prompt, one seed, two models: what did training change?</p>')
    prompt = prompt_panel(page, "compare")
    start, stop = buttons("compare", "Ask both" if engine.base else "Ask")
    settings = settings_panel(engine)
    warning = gr.HTML(notice(engine.no_base), elem_id="compare-notice")
    with gr.Row(elem_classes="pair", elem_id="compare-answers"):
        base = answer_panel("Base", engine.base.name, "base") if engine.base else ()
        trained = answer_panel("Trained", engine.trained.name, "trained")
    wire("compare", start, stop, prompt, compare_with(engine), settings, [warning, *base, *trained])
    return prompt


def guidance_tab(page: Page, tab: gr.Tab, asked: gr.Textbox) -> None:
    """The answer of a mixture; its prompt follows the one that was asked."""
    engine = page.engine
    gr.HTML(
        '<p class="lead">Turn training up and down. At each token, the two models\' log-probabilities are mixed with '
        "weight <i>w</i>: 0 is the base model, 1 the trained one, and beyond 1 the mixture goes on in the direction "
        "in which training went.</p>"
    )
    if engine.no_guidance:
        gr.HTML(notice(engine.no_guidance, "warn"))
        return
    prompt = prompt_panel(page, "guidance")
    scale = gr.Slider(0, 3, 1, step=0.1, label="Guidance weight w", elem_id="guidance-scale")
    gr.HTML(
        '<div class="scale" aria-hidden="true"><span>0 base</span><span>1 trained</span>'
        "<span>3 far beyond</span></div>"
    )
    start, stop = buttons("guidance", "Ask")
    settings = settings_panel(engine)
    warning = gr.HTML(elem_id="guidance-notice")
    with gr.Row(elem_classes="pair", elem_id="guidance-answers"):
        answer = answer_panel("Guided", f"{engine.base.name} → {engine.trained.name}", "guided")
        with gr.Column(min_width=280, elem_classes="answer bars"):
            gr.HTML('<p class="who"><b>Where they part</b> <span>next token, where the models differ most</span></p>')
            bars = gr.HTML('<p class="stats">…</p>', elem_id="bars")
    wire("guidance", start, stop, prompt, guide_with(engine), [scale, *settings], [warning, *answer])
    # In the browser, without asking the server at every key
    asked.change(None, asked, prompt, js="text => text", api_visibility="private")
    handler, inputs = bars_with(engine), [prompt, scale, settings[-1]]
    quietly = {"show_progress": "hidden", "concurrency_limit": AT_ONCE}
    # Not at every key: the models are asked again for each new prompt
    events = [scale.change, prompt.submit, prompt.blur, start.click, tab.select]
    gr.on(events, handler, inputs, bars, trigger_mode="always_last", **quietly)


def training_tab(page: Page) -> None:
    report = page.report
    if report.curves:
        curves_panel(report)
    if report.examples:
        gr.HTML("<h2>Held-out answers, before and after</h2>" + samples_html(report), elem_id="samples")
    if report.facts or report.configuration:
        gr.HTML("<h2>The run</h2>" + rows_html(report.facts, "The run"))
    if report.configuration:
        with gr.Accordion("Configuration", open=False):
            gr.HTML(rows_html(report.configuration, "Configuration"))
    if not (report.curves or report.examples or report.facts):
        gr.HTML(notice("This model came without the files of its run: run.json and metrics.jsonl."))


def curves_panel(report: Report) -> None:
    """Curves to choose from, with their smoothing."""
    shown = first_curves(report) or list(report.curves)[:2]
    choices = [(curve_title(name), name) for name in [*shown, *(n for n in report.curves if n not in shown)]]
    with gr.Row(elem_classes="choose"):
        names = gr.Dropdown(
            choices, value=shown, multiselect=True, max_choices=PLOTS, label="Curves", scale=4, elem_id="curve-names"
        )
        smoothing = gr.Slider(0, 0.95, 0.8, step=0.05, label="Smoothing", scale=1, min_width=180)

    def plots(chosen: list[str], amount: float) -> list[Any]:
        known = [name for name in chosen or [] if name in report.curves][:PLOTS]
        drawn = [
            gr.LinePlot(curve_table(report.curves[name], amount), title=curve_title(name), visible=True)
            for name in known
        ]
        return drawn + [gr.LinePlot(visible=False)] * (PLOTS - len(drawn))

    slots = []
    with gr.Row(elem_classes="plots"):
        for i in range(PLOTS):
            name = shown[i] if i < len(shown) else None
            slots.append(
                gr.LinePlot(
                    curve_table(report.curves[name], 0.8) if name else None,
                    x="step",
                    y="value",
                    color="series",
                    color_map={"logged": "#93a5a3", "curve": "#14998a"},
                    colors_in_legend=[],
                    title=curve_title(name) if name else None,
                    x_title="optimizer step",
                    y_title=" ",
                    # Short labels, which do not meet on a narrow screen: 2k, 0.125
                    x_axis_format="~s",
                    y_axis_format=".3~g",
                    height=240,
                    min_width=320,
                    visible=name is not None,
                    elem_id=f"curve-{i}",
                )
            )
    gr.on([names.change, smoothing.release], plots, [names, smoothing], slots, show_progress="hidden")


def about_tab(page: Page) -> None:
    report = page.report
    for method in report.methods:
        link = (
            f'<a href="https://arxiv.org/abs/{plain(method.paper_id)}" target="_blank" rel="noopener">'
            f"arXiv:{plain(method.paper_id)}</a>"
            if method.paper_id
            else ""
        )
        gr.HTML(
            f'<section class="paper"><h2>{plain(method.name)}</h2><p>{plain(method.summary)}</p>'
            f"<p><cite>{plain(method.paper_title)}</cite> {link}</p></section>"
        )
        if method.citation:
            gr.Code(method.citation, language=None, label="Citation", interactive=False, wrap_lines=True, lines=1)
    if report.command:
        gr.HTML("<h2>Repeat the run</h2>")
        gr.Code(report.command, language=None, label="Command", interactive=False, wrap_lines=True, lines=1)
    gr.HTML(
        '<section class="paper"><h2>About this page</h2><p>Both models answer on this machine, token by token, with '
        "the same prompt, settings and seed. Prompts are not stored. The guidance rule is that of "
        f'<a href="https://arxiv.org/abs/{GUIDANCE_PAPER[6:]}" target="_blank" rel="noopener">{GUIDANCE_PAPER}</a>, '
        "carried over from diffusion to next-token distributions. What the models say may be wrong.</p>"
        "<p>Trained and published with papertrl: papers on language-model post-training as trainers.</p></section>"
    )


def missing_page(page: Page) -> None:
    """What to read where there is no model to try."""
    gr.HTML(
        f'<section class="missing" id="missing"><h2>There is no model to try yet</h2><p>{plain(page.problem)}</p><ul>'
        "<li>On your machine: <code>python app.py --model FOLDER_OR_HUB_ID</code>, with the output directory of a run "
        "or the id of a model.</li><li>In a Space: name the model in <code>space.json</code>, as in "
        '<code>&#123;"model": "owner/name"&#125;</code>.</li><li>A private or gated model needs the secret '
        "<code>HF_TOKEN</code> of an account that may read it.</li></ul></section>"
    )


def build(page: Page) -> gr.Blocks:
    """
    The page.

    Args:
        page ([`Page`]):
            What [`open_page`] gave.
    """
    with gr.Blocks(title=f"{page.report.title or page.model or 'papertrl'} · try it") as demo:
        gr.HTML(page_head(page.report, page.model))
        if page.engine is None:
            missing_page(page)
        with gr.Tabs(overflow_behavior="wrap"):
            if page.engine is not None:
                with gr.Tab("Compare", id="compare"):
                    asked = compare_tab(page)
                with gr.Tab("Guidance", id="guidance") as tab:
                    guidance_tab(page, tab, asked)
            for name, fill in {"Training": training_tab, "About": about_tab}.items():
                with gr.Tab(name, id=name.lower()):
                    fill(page)
    return demo.queue(max_size=WAITING)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="app.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="output directory of a run, folder of a model or adapter, or Hub id")
    parser.add_argument("--base_model", help="model it was trained from (default: what the run says)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--host", help="address to listen on (default: this machine only, all in a Space)")
    return parser


def settings_of_space() -> dict[str, Any]:
    """Content of `space.json` beside this file: `model` (Hub id, or folder beside it), `base_model`, `run`."""
    path = HERE / SETTINGS_FILE
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if settings.get("model") and (HERE / settings["model"]).is_dir():
        settings["model"] = str(HERE / settings["model"])
    return settings


def main(argv: list[str] | None = None) -> None:
    """Serve the page until it is stopped."""
    args = make_parser().parse_args(argv)
    settings = settings_of_space()
    given = args.model is not None
    page = open_page(
        args.model if given else settings.get("model"),
        args.base_model or (None if given else settings.get("base_model")),
        None if given else settings.get("run"),
    )
    if page.problem:
        print(f"app.py: {page.problem} The page says what to do.", file=sys.stderr)
    build(page).launch(
        server_name=args.host,
        server_port=args.port,
        theme=THEME,
        css_paths=HERE / "style.css",
        footer_links=["gradio", "settings"],
        ssr_mode=False,
        max_file_size=LARGEST_UPLOAD,
    )


if __name__ == "__main__":
    main()

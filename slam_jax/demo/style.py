"""The look of the page: system fonts, light or dark as the browser is set."""

from typing import Any

# Column names belong to the model, so the head of the table is inactive; and the menu button of a
# narrow cell, which deletes columns, would lie under a double click.
CSS = """
.gradio-container { width: 100%; min-width: 0; max-width: 1180px !important; margin: 0 auto; }
.gradio-container .app { min-width: 0; padding-inline: clamp(12px, 3vw, 32px) !important; }
#intro h1 { margin: 0 0 0.25rem; }
#scenes img { image-rendering: pixelated; }
#aux th, #aux td { padding-inline: 2px; }
#aux th { pointer-events: none; }
#aux .cell-menu-button { display: none; }
#aux .cell-wrap { font: 0.8rem var(--font); padding-inline: 4px; }
#answer textarea { font-size: 1.5rem; line-height: 1.4; }
#notice .html-container, #maps .html-container { padding: 0; }
#notice:not(:has(p)) { display: none; }
#notice p { margin: 0; }
#notice p[role=alert] {
  padding: 0.6rem 0.8rem; border-radius: var(--radius-sm);
  border: 1px solid var(--error-border-color); background: var(--error-background-fill);
  color: var(--error-text-color);
}
"""


def make_theme() -> Any:
    from gradio import themes

    return themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    ).set(checkbox_background_color_selected_dark="*primary_600")

"""Names for assistive technology where ipywidgets gives none."""

import anywidget


class Labels(anywidget.AnyWidget):
    """Gives slider handles their visible label as a name for assistive technology. Shows nothing."""

    _esm = """
    export default { render({ el }) {
      const name = () => {
        const explorer = el.closest(".sidlab-explorer, .sidlab-question");
        if (!explorer) return;
        for (const handle of explorer.querySelectorAll(".noUi-handle")) {
          const row = handle.closest(".widget-inline-hbox");
          handle.setAttribute("aria-label", row?.querySelector(".widget-label")?.textContent ?? "");
          handle.setAttribute("aria-valuetext", row?.querySelector(".widget-readout")?.textContent ?? "");
        }
      };
      const timer = setInterval(name, 500);
      name();
      return () => clearInterval(timer);
    } }
    """

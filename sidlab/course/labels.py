"""Names for assistive technology where ipywidgets gives none."""

from sidlab.checks import from_extra

with from_extra("course"):
    import anywidget


class Labels(anywidget.AnyWidget):
    """Gives slider handles their visible label as a name for assistive technology. Not shown."""

    _esm = """
    export default { render({ el }) {
      const name = () => {
        const explorer = el.closest(".sidlab-explorer, .sidlab-question");
        if (!explorer) return;
        for (const handle of explorer.querySelectorAll(".noUi-handle")) {
          const row = handle.closest(".widget-inline-hbox");
          const text = (part) => row?.querySelector(part)?.textContent ?? "";
          handle.setAttribute("aria-label", text(".widget-label"));
          handle.setAttribute("aria-valuetext", text(".widget-readout"));
        }
      };
      const timer = setInterval(name, 500);
      name();
      return () => clearInterval(timer);
    } }
    """

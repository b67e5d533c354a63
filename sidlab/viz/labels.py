"""Names for assistive technology where ipywidgets and plotly give none."""

import anywidget
import traitlets


class Labels(anywidget.AnyWidget):
    """Names what ipywidgets and plotly leave nameless to assistive technology: slider handles by their visible label, the figure by
    `heading`. Shows nothing."""

    _esm = """
    export default { render({ model, el }) {
      const sizes = new ResizeObserver(() => window.dispatchEvent(new Event("resize")));  // a sidebar opens: the window stays
      const name = () => {
        const explorer = el.closest(".sidlab-explorer, .sidlab-question");
        if (!explorer) return;
        sizes.observe(explorer);
        for (const handle of explorer.querySelectorAll(".noUi-handle")) {
          const row = handle.closest(".widget-inline-hbox");
          handle.setAttribute("aria-label", row?.querySelector(".widget-label")?.textContent ?? "");
          handle.setAttribute("aria-valuetext", row?.querySelector(".widget-readout")?.textContent ?? "");
        }
        for (const plot of explorer.querySelectorAll(".js-plotly-plot"))
          if (plot.getAttribute("role") !== "img") {
            plot.setAttribute("role", "img");
            plot.setAttribute("aria-label", `${model.get("heading")} The text below says the same.`);
            window.dispatchEvent(new Event("resize"));  // plotly drew before it had its place, at a standard width
          }
      };
      const timer = setInterval(name, 500);
      name();
      return () => { clearInterval(timer); sizes.disconnect(); };
    } }
    """
    heading = traitlets.Unicode().tag(sync=True)

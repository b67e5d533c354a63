// Draws a chart explorer: state.alert, state.figure (without a template) by Plotly, and state.text, which says the same.
function draw(el, state, env) {
  if (!el.parts) {
    const part = role => {
      const div = document.createElement("div");
      div.setAttribute("role", role);
      el.append(div);
      return div;
    };
    el.parts = { alert: part("status"), figure: part("img"), text: part("status") };
    el.parts.text.className = "sidlab-text jp-RenderedHTMLCommon";
    el.parts.figure.setAttribute("aria-label", `${env.heading} The text below says the same.`);
    el.parts.figure.textContent = "The figure is loading …";
    // Plotly has no size for what is hidden, in another tab for example.
    el.sizes = new ResizeObserver(() => el.offsetParent && el.plotly?.Plots.resize(el.parts.figure));
    env.plotly.then(plotly => {
      el.plotly = plotly;
      el.parts.figure.textContent = "";
      el.again();
    });
  }
  const { alert, figure, text } = el.parts;
  el.again = () => draw(el, state, env);
  if (alert.innerHTML !== (state.alert ?? "")) alert.innerHTML = state.alert ?? "";
  if (text.said !== state.text) {
    const open = [...text.querySelectorAll("details")].map(details => details.open);
    text.innerHTML = text.said = state.text;
    text.querySelectorAll("details").forEach((details, i) => details.open = open[i] ?? false);
  }
  if (!el.plotly) return;

  const layout = { ...state.figure.layout, template: env.looks[env.dark ? 1 : 0] };
  if (env.reduced) delete layout.transition;
  const first = !figure.classList.contains("js-plotly-plot");
  el.plotly.react(figure, structuredClone(state.figure.data), structuredClone(layout), { responsive: true, displayModeBar: false });
  if (first) {
    el.sizes.observe(el);
    figure.on("plotly_click", ({ points: [point] }) => env.act({ trace: point.curveNumber, x: point.x, y: point.y }));
  }
}

// What a notebook adds around a view's own `draw(el, state, env)`: the state out of the widget's model, Plotly once a page, the theme.

// The model holds a state as leaves, "/figure/data/#0/x": a value each. Leaves that have gone are null.
function nested(attributes) {
  const root = {};
  for (const [path, value] of Object.entries(attributes)) {
    if (path[0] !== "/" || value === null) continue;
    const steps = path.slice(1).split("/");
    let node = root;
    steps.forEach((step, i) => {
      const key = step[0] === "#" ? Number(step.slice(1)) : step.replaceAll("~1", "/");
      if (i === steps.length - 1) node[key] = value;
      else node = node[key] ??= steps[i + 1][0] === "#" ? [] : {};
    });
  }
  return root;
}

// The library's widget holds plotly.min.js, packed. However long that takes to arrive, views wait for it.
function loaded(library) {
  return globalThis.sidlabPlotly ??= (async () => {
    const unpacked = new Blob([library.get("plotly")]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(unpacked).text();
    const other = globalThis.Plotly;
    document.head.append(script);
    const ours = globalThis.Plotly;
    globalThis.Plotly = other ?? ours;
    return ours;
  })();
}

// JupyterLab says its theme; elsewhere it is that of the reader's system.
function isDark() {
  const said = document.body.dataset.jpThemeLight;
  return said ? said === "false" : matchMedia("(prefers-color-scheme: dark)").matches;
}

export default {
  async render({ model, el }) {
    const find = async name => model.get(name) && model.widget_manager.get_model(model.get(name).replace("IPY_MODEL_", ""));
    el.classList.add("sidlab-view");
    const [held, library] = await Promise.all([find("state"), find("library")]);
    const env = {
      heading: model.get("heading"),
      looks: library?.get("looks"),
      plotly: library && loaded(library),
      reduced: matchMedia("(prefers-reduced-motion: reduce)").matches,
      act: content => held.send(content),
    };
    const place = document.createElement("div");
    el.append(place);

    // A burst of changes is drawn once, as it stands when the browser is ready to draw.
    let asked = null;
    const show = () => {
      asked = null;
      draw(place, nested(held.attributes), { ...env, dark: isDark() });
    };
    const ask = () => asked ??= requestAnimationFrame(show);
    held.on("change", ask);
    const theme = new MutationObserver(ask);
    theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
    show();

    // The picture for a notebook without a kernel is the output that follows, sooner or later; an
    // explorer inside of another widget has none.
    const explorer = el.closest(".sidlab-explorer");
    const output = explorer?.parentElement.closest(".widget-box") ? null : el.closest(".jp-OutputArea-child");
    const hide = () => output?.nextElementSibling?.style.setProperty("display", "none");
    const outputs = new MutationObserver(hide);
    if (output) outputs.observe(output.parentElement, { childList: true });
    hide();
    return () => {
      held.off("change", ask);
      theme.disconnect();
      outputs.disconnect();
      cancelAnimationFrame(asked);
    };
  },
};

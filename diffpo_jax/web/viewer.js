// The denoising viewer: two responses to one problem beside each other, one call of the denoiser after the other.
// A side is a record of diffpo_jax/denoisings.py.

function makeViewer(root, options) {
  const numbers = `shown-${root.id}`;
  let pair = null, call = 0, timer = null, mode = "call";

  const sides = { base: makeSide("base", "base model"), trained: makeSide("trained", "trained model") };
  const problem = element("div", { class: "problem", tabindex: 0, role: "region", "aria-label": "problem" });
  const slider = element("input", { type: "range", min: 0, max: 1, step: 1, value: 0, "aria-label": "call of the denoiser", on: { input: () => { stop(); show(Number(slider.value)); } } });
  const back = element("button", { type: "button", text: "◀", "aria-label": "one call back", on: { click: () => { stop(); show(call - 1); } } });
  const forth = element("button", { type: "button", text: "▶|", "aria-label": "one call on", on: { click: () => { stop(); show(call + 1); } } });
  const play = element("button", { type: "button", class: "play", text: "Play", on: { click: toggle } });
  const status = element("output", { "aria-live": "polite" });
  const choice = element("fieldset", { class: "choice" }, element("legend", { text: "Colour and number" }),
    ...[["call", "call it was filled in at"], ["confidence", "confidence, %"]].map(([value, text]) =>
      element("label", {}, element("input", { type: "radio", name: numbers, value, checked: value === mode, on: { change: () => { mode = value; show(call); } } }), text)));
  const scale = element("span", { class: "scale" });
  const key = element("p", { class: "key" }, scale,
    element("span", { text: "bar under a token: its probability when it was filled in" }),
    element("span", { text: "framed: filled in at this call" }), element("span", { text: "dashed: masked" }), element("span", { text: "· end of the response" }));

  const box = element("div", { class: "viewer", role: "group", "aria-label": "denoising viewer; space plays and pauses", on: { keydown: onKey } },
    ...(options.above || []), problem,
    element("div", { class: "controls" }, back, play, forth, element("div", { class: "range" }, slider), status), choice,
    element("div", { class: "sides" }, sides.base.node, sides.trained.node), key);
  root.append(box);

  function last() {
    return Math.max(pair.base.nfe, pair.trained.nfe);
  }

  function load(given) {
    stop();
    pair = given;
    problem.textContent = pair.prompt;
    slider.max = last();
    for (const name of ["base", "trained"]) sides[name].load(pair[name], options.threshold(name, pair[name]));
    show(last());
  }

  function show(number) {
    call = Math.max(0, Math.min(last(), number));
    slider.value = call;
    const text = call === 0 ? `before the first of ${last()} calls` : `call ${call} of ${last()}`;
    slider.setAttribute("aria-valuetext", text);
    status.textContent = text;
    back.disabled = call === 0;
    forth.disabled = call === last();
    for (const name of ["base", "trained"]) sides[name].show(call, mode, last());
    scale.replaceChildren(mode === "call" ? "call 1" : "0%", element("i"), mode === "call" ? `call ${last()}` : "100%");
  }

  function toggle() {
    if (timer) return stop();
    if (call === last()) show(0);
    play.textContent = "Pause";
    status.setAttribute("aria-live", "off");
    timer = setInterval(() => { show(call + 1); if (call === last()) stop(); }, options.pace || 700);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    status.setAttribute("aria-live", "polite");
  }

  function onKey(event) {
    const typed = ["SELECT", "TEXTAREA", "BUTTON"].includes(event.target.tagName) || ["radio", "checkbox"].includes(event.target.type);
    if (event.key !== " " || typed || !pair) return;
    event.preventDefault();
    toggle();
  }

  return { load, show, play, box };
}

function makeSide(name, title) {
  const facts = element("p", { class: "facts" }), verdict = element("p", { class: "verdict" });
  const tokens = element("div", { class: "tokens", role: "img" });
  const node = element("div", { class: `side ${name}` }, element("h3", { text: title }), facts, tokens, verdict);
  let record = null, threshold = "", cells = [];

  function load(given, words) {
    [record, threshold] = [given, words];
    cells = record.tokens.map((symbol) => // as wide as what will stand there, so that nothing moves when it does
      element("span", { class: "token", vars: { "--chars": Math.min(symbol.length, 16) } }, element("b"), element("i"), element("small")));
    tokens.replaceChildren(...cells);
  }

  function show(call, mode, most) {
    const seen = Math.min(call, record.nfe);
    facts.textContent = `call ${seen} of ${record.nfe}${threshold ? ` · ${threshold}` : ""}`;
    record.tokens.forEach((symbol, k) => showToken(cells[k], symbol, k, call, mode, most));
    const text = record.tokens.map((symbol, k) => (record.steps[k] < call ? symbol : "_")).join("");
    tokens.setAttribute("aria-label", `${title} after call ${seen} of ${record.nfe}: ${text}`);
    showVerdict(call >= record.nfe);
  }

  function showToken(cell, symbol, k, call, mode, most) {
    const step = record.steps[k], sure = record.confidence[k], there = step < call, filled = there && sure === null;
    const share = mode === "call" ? (most > 1 ? step / (most - 1) : 0) : sure;
    cell.className = `token${there ? "" : " masked"}${filled ? " filled" : ""}${there && step === call - 1 ? " new" : ""}`;
    cell.children[0].textContent = there ? symbol : "_";
    cell.children[2].textContent = !there || filled ? "" : mode === "call" ? step + 1 : Math.round(100 * sure);
    cell.style.setProperty("--at", there && !filled ? share : 0);
    cell.style.setProperty("--sure", there && !filled ? sure : 0);
    cell.title = !there ? "masked" : filled ? "behind the end of the response"
      : `call ${step + 1}, confidence ${percent(sure)}, entropy ${short(record.entropy[k])} nats`;
  }

  function showVerdict(done) {
    verdict.replaceChildren();
    if (!done) return;
    if (record.correct === null) verdict.append("no known answer, so no verdict");
    else verdict.append(element("span", { class: record.correct ? "right" : "wrong", text: record.correct ? "✓ right" : "✗ wrong" }), `, reward ${record.reward.toFixed(2)}`);
    verdict.append(`, ${record.nfe} ${record.nfe === 1 ? "call" : "calls"} (NFE)`);
  }

  return { node, load, show };
}

// --mode=serve: asks the server for two denoisings and shows them in the viewer.

function main() {
  const data = pageData(), { low, high, start, learned, problems } = data;
  const gammaOf = (share) => low * (high / low) ** share, shareOf = (gamma) => Math.log(gamma / low) / Math.log(high / low);
  const [form, prompt, slider, own, go, error] = ["form", "prompt", "gamma", "learned", "go", "error"].map(byId);
  const chosen = byId("chosen");
  const threshold = (name, record) => (record.gamma === null ? "" : `${record.chosen ? "learned γ" : "γ"} = ${short(record.gamma)}`);
  let viewer = null;

  chosen.append(element("option", { text: "your own", value: "" }), ...problems.map((text, i) => element("option", { text: `${i + 1}. ${text.replace(/\s+/g, " ").slice(0, 90)}`, value: i })));
  slider.max = 1;
  slider.value = high > low ? shareOf(start) : 0;
  const showGamma = () => {
    const text = short(gammaOf(Number(slider.value)));
    byId("gamma-value").textContent = `= ${text}`;
    slider.setAttribute("aria-valuetext", text);
  };
  showGamma();
  slider.addEventListener("input", showGamma);
  slider.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 0.02, ArrowUp: 0.02, ArrowLeft: -0.02, ArrowDown: -0.02 }[event.key];
    if (!step) return;
    event.preventDefault();
    slider.value = Number(slider.value) + step;
    showGamma();
  });
  byId("thresholds").hidden = !data.thresholds;
  if (!learned) byId("learned-label").remove();

  chosen.addEventListener("change", () => { if (chosen.value !== "") prompt.value = problems[Number(chosen.value)]; });
  prompt.addEventListener("input", () => { const at = problems.indexOf(prompt.value); chosen.value = at < 0 ? "" : at; });
  prompt.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); } });
  form.addEventListener("submit", (event) => { event.preventDefault(); run(); });

  async function run() {
    go.disabled = true;
    go.textContent = "Denoising …";
    error.textContent = "";
    try {
      const body = JSON.stringify({ prompt: prompt.value, gamma: Math.min(high, Math.max(low, gammaOf(Number(slider.value)))), learned: learned && own.checked });
      const answer = await fetch("/denoise", { method: "POST", headers: { "Content-Type": "application/json" }, body });
      const found = await answer.json();
      if (!answer.ok) throw new Error(found.error);
      if (!viewer) viewer = makeViewer(byId("viewer"), { threshold });
      viewer.load(found);
      if (!matchMedia("(prefers-reduced-motion: reduce)").matches) viewer.play.click();
    } catch (problem) {
      error.textContent = problem instanceof TypeError ? "The server does not answer: is it still running?" : problem.message;
    }
    go.disabled = false;
    go.textContent = "Denoise";
  }

  chosen.value = 0;
  prompt.value = problems[0];
  run();
}

main();

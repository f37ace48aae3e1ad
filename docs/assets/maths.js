// Typesets what Arithmatex marked, with the KaTeX that lies beside it: no network is needed.
document$.subscribe(() => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const tex = element.textContent.trim();
    katex.render(tex.slice(2, -2), element, { displayMode: tex.startsWith("\\[") });
  }
});

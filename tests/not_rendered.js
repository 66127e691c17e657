// Texts of a page that still show the marks of Markdown or TeX, and formulas that could not be set
() => {
    const marks = /\$[^$]+\$|\\\(|\\\[|\[@\w|\]\(|\*\*\S/
    const own_text = e => [...e.childNodes].filter(n => n.nodeType == 3).map(n => n.textContent).join('')
    const kinds = 'main p, main li, main td, main h1, main h2, main h3, main h4, merror'
    const found = [...document.querySelectorAll(kinds)].filter(e => e.tagName == 'MERROR' || marks.test(own_text(e)))
    return found.map(e => e.textContent.slice(0, 80))
}

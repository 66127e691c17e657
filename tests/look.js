// What a reader can see of a page: text and its contrast with what is behind it (WCAG 2, transparency included),
// and boxes that stick out of the page without a way to scroll to them
() => {
    const numbers = colour => colour.match(/[\d.]+/g).map(Number)
    const linear = x => x <= .03928 ? x/12.92 : ((x + .055)/1.055)**2.4
    const light = colour => colour.map(x => linear(x/255)).reduce((s, x, i) => s + x*[.2126, .7152, .0722][i], 0)

    const over = (top, below) => top.slice(0, 3).map((x, i) => (top[3] ?? 1)*x + (1 - (top[3] ?? 1))*below[i])
    const background = e => numbers(getComputedStyle(e).backgroundColor)
    const behind = e => e ? over(background(e), behind(e.parentElement)) : [255, 255, 255]
    const ratio = e => {
        const below = behind(e)
        const both = [light(over(numbers(getComputedStyle(e).color), below)), light(below)]
        return (Math.max(...both) + .05)/(Math.min(...both) + .05)
    }

    const parents = function*(e) { for (; e; e = e.parentElement) yield e }
    const opacity = e => [...parents(e)].map(p => +getComputedStyle(p).opacity).reduce((a, b) => a*b)
    const shown = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true}) && opacity(e) > .5
    const has_text = e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())
    const texts = selector => [...document.querySelectorAll(selector)].filter(e => has_text(e) && shown(e))

    const name = e => `${e.tagName}: ${e.textContent.trim().slice(0, 40)}`
    const worst = es => es.map(e => [ratio(e), name(e)]).sort((a, b) => a[0] - b[0])[0] ?? [21, '']
    const prose = texts('main p, main td, main li, main h1, main h2, main h3, main mi, main mn, main a, '
                        + '.sidebar a, .navbar a, .navbar-title')

    const scrolls = e => {
        for (; e && e.tagName != 'MAIN'; e = e.parentElement)
            if (/auto|scroll/.test(getComputedStyle(e).overflowX)) return true
    }
    const sticks_out = e => e.getBoundingClientRect().right > innerWidth + 2 && !scrolls(e) && shown(e)
    return {
        prose: worst(prose),
        code: worst(texts('main pre *')),
        characters: prose.map(e => e.textContent.length).reduce((a, b) => a + b, 0),
        small: prose.filter(e => parseFloat(getComputedStyle(e).fontSize) < 9).map(e => e.textContent),
        dark: light(behind(document.body)) < .2,
        font: getComputedStyle(document.body).fontFamily,
        outside: [...document.querySelectorAll('main *')].filter(sticks_out).map(e => e.outerHTML.slice(0, 60)),
    }
}

"""The page of `inspect` in a browser: its numbers are the library's, and everybody can use it."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from miniconvit import ConViTConfig, UserError, convit_forward, init_params, layers, param_shapes
from miniconvit.analysis import page as pages
from miniconvit.analysis.maps import attention_maps
from miniconvit.analysis.page import Picture, write_page
from miniconvit.analysis.style import MAPS
from miniconvit.config import VARIANTS
from miniconvit.data import normalize

CONFIG = ConViTConfig(
    img_size=(12, 10), patch_size=(4, 2), num_classes=5, embed_dim=12, depth=4, num_heads=4,
    mlp_ratio=1.5, local_up_to_layer=3,
)  # fmt: skip
KINDS = {
    "gpsa": CONFIG,
    "psa": replace(CONFIG, attention="psa"),
    "twin": replace(CONFIG, local_up_to_layer=0),
    "all gpsa": replace(CONFIG, local_up_to_layer=4, qkv_bias=True, use_pos_embed=False),
    "grey": replace(CONFIG, in_chans=1, num_classes=1),
}
STRANGE = [
    "</script><script>window.bad=1</script>",
    "a\"b'c`${bad}",
    "猫 über\u2028\x00",
    "<!--",
    "&lt;b>",
]


def model_of(config, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        name: rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)
        for name, shape in param_shapes(config).items()
    }
    channels = config.in_chans
    return SimpleNamespace(
        config=config, params=params, mean=[0.4] * channels, std=[0.25] * channels
    )


def pictures_of(config, n=3):
    rng = np.random.default_rng(1)
    shape = (n, config.in_chans, *config.image)
    pixels = rng.integers(0, 256, shape).astype("uint8")
    return [
        Picture(image, f"image {i + 1}", i % config.num_classes) for i, image in enumerate(pixels)
    ]


def history_of(config, epochs=4):
    rng = np.random.default_rng(2)

    def heads(layers):
        return rng.uniform(0.1, 0.9, (layers, config.num_heads)).round(4).tolist()

    local = config.local_up_to_layer
    gated = local if config.attention == "gpsa" else 0
    return [
        (
            epoch,
            {"gates": heads(gated), "strengths": heads(local), "nonlocality": heads(config.depth)},
        )
        for epoch in range(epochs)
    ]


@pytest.fixture
def opened(browser, tmp_path):
    """Writes the page of a model, opens it and, in the end, looks for errors."""

    def open_page(config, pictures=None, **arguments):
        model = model_of(config) if isinstance(config, ConViTConfig) else config
        path = tmp_path / "page 1.html"
        write_page(path, model, pictures or pictures_of(model.config), **arguments)
        assert path.stat().st_size <= 3_000_000
        appear(browser)
        browser.open(path)
        return browser

    browser.get_log("browser")
    yield open_page
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource')") == []


def appear(browser, width=1280, dark=False, still=False):
    """A window of this width, by day or by night; still: no motion is wanted."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = {
        "prefers-color-scheme": "dark" if dark else "light",
        "prefers-reduced-motion": "reduce" if still else "no-preference",
    }
    features = [{"name": name, "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def settle(browser):
    """Waits until the page has drawn what has changed."""
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")


def find(browser, css):
    return browser.find_elements("css selector", css)


def choose(browser, css):
    """A click on a radio button, whose face stands in its place."""
    browser.execute_script("document.querySelector(arguments[0]).click()", css)
    settle(browser)


def slide(browser, css, *values):
    """Drags sliders, the first ones that fit, to these values."""
    script = """const [css, ...values] = arguments;
        values.forEach((value, i) => {
          const slider = document.querySelectorAll(css)[i];
          slider.value = value;
          slider.dispatchEvent(new Event("input"));
        });"""
    browser.execute_script(script, css, *map(str, values))
    settle(browser)


def text(browser, css):
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", css)


def maps_on(browser, layer, head, query):
    return browser.execute_script("return mapsOf(...arguments)", layer, head, query)


# Its numbers are the library's.


def turned(model, gates, factors):
    """The model's parameters with other gates (layers, H) and times as strong positions."""
    params = dict(model.params)
    for i in range(model.config.local_up_to_layer):
        name = f"blocks.{i}.attn."
        if f"{name}gating_param" in params:
            params[f"{name}gating_param"] = np.log(gates[i] / (1 - gates[i]))
        params[f"{name}pos_proj.weight"] = (
            model.params[f"{name}pos_proj.weight"] * factors[i][:, None]
        )
    return params


def turn(browser, config, rng):
    """Drags the sliders of all heads: (gates, factors), each (layers, H)."""
    shape = (config.depth, config.num_heads)
    gates = rng.integers(1, 100, shape) / 100
    factors = rng.integers(0, 81, shape) / 20
    for i in range(config.local_up_to_layer):
        choose(browser, f"#layers label:nth-of-type({i + 1}) input")
        if config.attention == "gpsa":
            slide(browser, "#heads input.gate", *gates[i])
        slide(browser, "#heads input.strength", *factors[i])
    return gates, factors


def check_maps(browser, layer, truth, tokens, rng):
    for _ in range(3):
        head, query = int(rng.integers(CONFIG.num_heads)), int(rng.integers(tokens))
        found = maps_on(browser, layer, head, query)
        np.testing.assert_allclose(
            found["mixture"], truth.mixture[0, head, query], rtol=0, atol=1e-5
        )
        if truth.gate is not None:
            np.testing.assert_allclose(found["content"], truth.content[0, head, query], 0, 1e-5)
            np.testing.assert_allclose(found["position"], truth.position[head, query], 0, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_the_page_answers_as_the_library_whatever_the_knobs(kind, opened):
    config, rng = KINDS[kind], np.random.default_rng(3)
    model, pictures = model_of(config), pictures_of(config)
    browser = opened(model, pictures)
    choose(browser, "#images label:nth-of-type(2) input")
    image = normalize(pictures[1].pixels[None], model.mean, model.std, "float64")
    for params in (model.params, None):
        params = params or turned(model, *turn(browser, config, rng))
        for i, truth in enumerate(attention_maps(image, params, config)):
            check_maps(browser, i, truth, truth.mixture.shape[-1], rng)
        logits, _ = convit_forward(image, params, config)
        probabilities, _ = layers.softmax_forward(logits)
        shown = browser.execute_script("return probabilities()")
        np.testing.assert_allclose(shown, probabilities[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpsa", "psa", "twin"])
def test_of_a_larger_model_the_maps_are_the_library_s(kind, opened, monkeypatch):
    """Where the model does not run in the page, a knob changes the layer's own maps alone."""
    monkeypatch.setattr(pages, "MOST_PRODUCTS", 0)
    config, rng = KINDS[kind], np.random.default_rng(4)
    model, pictures = model_of(config), pictures_of(config)
    browser = opened(model, pictures)
    image = normalize(pictures[0].pixels[None], model.mean, model.std, "float64")
    trained = attention_maps(image, model.params, config)
    for i, truth in enumerate(trained):
        check_maps(browser, i, truth, truth.mixture.shape[-1], rng)
    gates, factors = turn(browser, config, rng)
    params = turned(model, gates, factors)
    for i in range(config.local_up_to_layer):
        weight = params[f"blocks.{i}.attn.pos_proj.weight"]
        P, _ = layers.position_attention_dense_forward(weight, np.zeros(4), config.grid)
        if kind == "gpsa":
            A = (1 - gates[i])[:, None, None] * trained[i].content + gates[i][:, None, None] * P
        else:
            scores = trained[i].q @ trained[i].k.swapaxes(-1, -2) / 3**0.5
            A, _ = layers.softmax_forward(scores + np.log(P))
        check_maps(browser, i, SimpleNamespace(mixture=A, gate=None), 15, rng)
    logits, _ = convit_forward(image, model.params, config)
    shown = browser.execute_script("return probabilities()")
    np.testing.assert_allclose(shown, layers.softmax_forward(logits)[0][0], rtol=0, atol=1e-5)
    assert ("too large to run in a page" in text(browser, "#knobs-reach")) == (kind != "twin")


def test_what_is_written_and_painted_are_these_numbers(opened):
    matplotlib = pytest.importorskip("matplotlib")
    model, pictures = model_of(CONFIG), pictures_of(CONFIG)
    browser = opened(model, pictures, classes=STRANGE)
    image = normalize(pictures[0].pixels[None], model.mean, model.std, "float64")
    choose(browser, "#layers label:nth-of-type(2) input")
    rows, cols = CONFIG.grid
    query, key, block = 1 * cols + 3, 2 * cols + 4, attention_maps(image, model.params, CONFIG)[1]
    browser.execute_script("update({patch: arguments[0], key: arguments[1]})", query, key)
    settle(browser)
    row, col = np.divmod(np.arange(rows * cols), cols)
    distance = np.hypot(row - row[query], col - col[query])
    pixels = """const canvases = document.querySelectorAll("#heads article:nth-of-type(2) canvas");
        return [...canvases].map((canvas) => [
            ...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data])"""
    maps = {
        "content": block.content[0, 1, query],
        "position": block.position[1, query],
        "mixture": block.mixture[0, 1, query],
    }
    values = find(browser, "#heads article:nth-of-type(2) .maps .value")
    for (kind, shares), painted, value in zip(
        maps.items(), browser.execute_script(pixels), values, strict=True
    ):
        assert value.text == f"{shares[key]:.3f}"
        colours = matplotlib.colors.LinearSegmentedColormap.from_list(kind, MAPS[kind])
        expected = 255 * colours(matplotlib.colors.PowerNorm(0.5, 0, 0.5, clip=True)(shares))[:, :3]
        found = np.reshape(painted, (rows * cols, 4))[:, :3]
        np.testing.assert_allclose(found, expected, rtol=0, atol=3)
    card = text(browser, "#heads article:nth-of-type(2)")
    assert f"looks {(maps['mixture'] * distance).sum():.2f} patches far" in card
    assert f"gate {block.gate[1]:.2f}" in card
    w = model.params["blocks.1.attn.pos_proj.weight"][1]
    assert f"strength {-w[2]:.2f}" in card
    browser.execute_script("update({over: '1'})")
    settle(browser)
    veil = """return [...document.querySelectorAll("#picture .veil")].map(
        (rect) => Number(rect.getAttribute("opacity")))"""
    shares = maps["mixture"] / maps["mixture"].max()
    found = browser.execute_script(veil)
    np.testing.assert_allclose(found, 0.86 * (1 - np.sqrt(shares)), rtol=0, atol=1e-5)
    last = attention_maps(image, model.params, CONFIG)[3].mixture[0, :, 0]
    itself = [value.text for value in find(browser, "#reader .value")][:4]
    assert itself == [f"itself {share:.3f}" for share in last[:, 0]]


def test_centres_are_said_and_a_head_without_one_too(opened):
    model = model_of(CONFIG)
    weights = [[2.0, -1.0, -1.0], [-0.5, 3.0, -0.5], [1.0, 1.0, 0.0], [1.0, 1.0, 0.5]]
    model.params["blocks.2.attn.pos_proj.weight"] = np.array(weights)
    browser = opened(model)
    assert [line.text for line in find(browser, ".centre")] == [
        "centre 1.00 right, 0.50 up (in patches)",
        "centre 0.50 left, 3.00 down (in patches)",
        "no centre: this head is pushed away on all sides",
        "no centre: this head is pushed away on all sides",
    ]


def test_the_time_line_says_what_the_run_recorded(opened):
    history = history_of(CONFIG)
    browser = opened(CONFIG, history=history)
    choose(browser, "#layers label:nth-of-type(2) input")
    slide(browser, "#epoch", 2)
    assert text(browser, "#epoch-value") == "2"
    shown = [item.text for item in find(browser, "#gates-chart li")]
    assert shown == [f"head {h + 1} {gate:.3f}" for h, gate in enumerate(history[2][1]["gates"][1])]
    means = np.mean(history[2][1]["nonlocality"], axis=1)
    for item, mean in zip(find(browser, "#nonlocality-chart li"), means, strict=True):
        assert item.text.endswith(f"{mean:.3f}")
    choose(browser, "#layers label:nth-of-type(4) input")
    assert "Layer 4 has no gate" in text(browser, "#gates-chart")


# What a model lacks is absent, and said.


@pytest.mark.parametrize("kind", KINDS)
def test_controls_without_sense_are_absent_and_said(kind, opened):
    config = KINDS[kind]
    browser = opened(config, history=history_of(config))
    local, token = config.local_up_to_layer > 0, config.has_cls_token
    shown = {
        name: find(browser, name)[0].is_displayed() for name in ("#gate-knob", "#strength-knob")
    }
    gated = local and config.attention == "gpsa"
    assert shown == {"#gate-knob": gated, "#strength-knob": local}
    assert ("No layer of this model has a gate" in text(browser, "#no-gate")) == (
        local and not gated
    )
    assert ("This model has no knobs" in text(browser, "#no-gate")) == (not local)
    assert find(browser, "#head-curves")[0].is_displayed() == local
    assert find(browser, "#ask-token")[0].is_displayed() == token
    words = text(browser, "#reader-help")
    assert find(browser, "#reset")[0].is_displayed() == local
    assert ("class token, a vector that stands for no patch" in words) == token
    assert ("read from the first patch" in words) == (not token)
    assert ("one logit" in text(browser, "#verdict")) == (config.num_classes == 1)
    assert "class 0" in text(browser, "#prediction") or config.num_classes != 5
    for button in find(browser, "#tour-buttons button"):
        button.click()
    settle(browser)


def test_one_patch_one_head_one_epoch(opened):
    config = replace(CONFIG, img_size=4, patch_size=4, num_heads=1, embed_dim=3)
    browser = opened(config, history=history_of(config, 1))
    assert "looks 0.00 patches far" in text(browser, "#heads")
    assert "NaN" not in browser.execute_script("return document.body.innerHTML")


def test_a_bare_checkpoint_has_no_time_line(opened):
    browser = opened(CONFIG)
    assert not find(browser, "#history")[0].is_displayed()
    assert "no time line" in text(browser, "#no-history")


def test_names_stay_names(opened):
    pictures = [replace(picture, name=STRANGE[0]) for picture in pictures_of(CONFIG)]
    browser = opened(CONFIG, pictures, classes=STRANGE, title=STRANGE[1])
    assert browser.execute_script("return window.bad ?? null") is None
    shown = browser.execute_script(
        "return [...document.querySelectorAll('#classes b')].map((name) => name.textContent)"
    )
    assert sorted(shown) == sorted(STRANGE)
    assert text(browser, "#model").startswith(f"{STRANGE[1]}: ")
    label = find(browser, "#images label")[1].get_attribute("title")
    assert label == f"{STRANGE[0]}, {STRANGE[1]}"


# It is at most 3 MB.


def test_of_a_published_size_the_page_holds_the_layers_that_fit(opened):
    config = replace(VARIANTS["convit_tiny"], mlp_ratio=0.1)  # 224 pixels, 1,000 classes
    model = SimpleNamespace(
        config=config, params=init_params(config), mean=[0.5] * 3, std=[0.2] * 3
    )
    pictures = pictures_of(config, 2)
    browser = opened(model, pictures)  # looks at the size
    held = [i for i, radio in enumerate(find(browser, "#layers input")) if radio.is_enabled()]
    assert 7 < len(held) < 12 and held[-1] == 11
    assert f"holds {', '.join(str(i + 1) for i in held)}" in text(browser, "#left-out")
    assert "1 of 2 images" in text(browser, "#left-out")
    image = normalize(pictures[0].pixels[None], model.mean, model.std)
    truth = attention_maps(image, model.params, config)
    for i in held:
        check_maps(browser, i, truth[i], truth[i].mixture.shape[-1], np.random.default_rng(i))


@pytest.mark.parametrize(
    "room, layers, images",
    [
        (3 * (500 + 4 * 1536), [0, 1, 2, 3], 3),
        (2 * (500 + 4 * 1536) - 1, [0, 1, 2, 3], 1),
        (500 + 4 * 1536 - 1, [1, 2, 3], 1),
        (500 + 2 * 1536, [1, 3], 1),
        (500 + 1536, [3], 1),
    ],
)
def test_images_go_before_layers(room, layers, images):
    """q and k of a layer: 2 times 16 tokens of 12 numbers, 1,152 bytes, in base64 1,536."""
    assert pages._room_for(CONFIG, room, 500) == (layers, images)


def test_a_layer_that_does_not_fit_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "MOST_BYTES", pages.ROOM + 3_000)
    with pytest.raises(UserError, match=r"one layer of this model takes 0\.0 MB and a page has 3"):
        write_page(tmp_path / "page.html", model_of(CONFIG), pictures_of(CONFIG))


def test_an_answer_that_is_not_finite_is_refused(tmp_path):
    model = model_of(CONFIG)
    model.params["head.bias"][:] = np.nan
    with pytest.raises(UserError, match="no finite answer for image 1"):
        write_page(tmp_path / "page.html", model, pictures_of(CONFIG))


def test_the_ready_page_is_as_one_written_today(tmp_path):
    """Else, write it again: miniconvit train, and then miniconvit inspect
    runs/shapes-convit_micro32-seed0 --page docs/heads.html."""
    ready = Path(__file__).parents[2] / "docs" / "heads.html"
    write_page(tmp_path / "page.html", model_of(CONFIG), pictures_of(CONFIG))
    around = [
        re.sub(r'id="data">.*?</script>', "", path.read_text(), flags=re.DOTALL)
        for path in (ready, tmp_path / "page.html")
    ]
    assert around[0] == around[1]
    assert ready.stat().st_size <= 1_000_000


def test_without_positions_the_ready_page_names_the_texture_and_loses_the_place(browser):
    """As README and tutorial 16 say."""
    browser.open(Path(__file__).parents[2] / "docs" / "heads.html")
    data = browser.execute_script("return data")
    truths = [data["classes"][image["truth"]] for image in data["images"]]
    answers = browser.execute_script(
        """takeStep(steps.find(({name}) => name === "Content alone"));
        return data.images.map((_, image) => {
            state.image = image;
            const shares = probabilities();
            return className(shares.indexOf(Math.max(...shares)));
        });"""
    )
    assert answers == [f"{truth.partition(',')[0]}, top right" for truth in truths]
    trained = [data["classes"][np.argmax(image["probabilities"])] for image in data["images"]]
    assert trained == truths
    assert len(truths) == 10


# Mouse, touch, keyboard.


def point(browser, row, col, kind="mouseMoved", css="#picture"):
    """The pointer in the middle of a patch."""
    box = browser.execute_script(
        "const box = document.querySelector(arguments[0]); box.scrollIntoView({block: 'center'});"
        "return box.getBoundingClientRect().toJSON()", css,
    )  # fmt: skip
    rows, cols = CONFIG.grid
    place = {
        "x": box["x"] + (col - 0.5) * box["width"] / cols,
        "y": box["y"] + (row - 0.5) * box["height"] / rows,
    }
    if kind.startswith("touch"):
        points = [] if kind == "touchEnd" else [place]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    else:
        mouse = {
            "type": kind,
            "button": "none" if kind == "mouseMoved" else "left",
            "clickCount": 1,
        }
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", mouse | place)
    settle(browser)


def leave(browser):
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 3, "y": 3})
    settle(browser)


def asking(browser):
    return text(browser, "#query")


def test_the_mouse_asks_keeps_and_reads(opened):
    browser = opened(CONFIG)
    leave(browser)
    kept = asking(browser)
    point(browser, 1, 2)
    assert "row 1, column 2 asks" in asking(browser)
    leave(browser)
    assert asking(browser) == kept
    point(browser, 3, 5, "mousePressed")
    point(browser, 3, 5, "mouseReleased")
    leave(browser)
    assert "row 3, column 5 asks" in asking(browser)
    point(browser, 2, 1, css="#heads article .map")
    assert "row 2, column 1" in asking(browser)
    share = maps_on(browser, 2, 0, 14)["content"][5]
    assert find(browser, "#heads article .maps .value")[0].text == f"{share:.3f}"
    leave(browser)
    assert find(browser, "#heads article .maps .value")[0].text.startswith("most")
    from selenium.webdriver import ActionChains

    slider = find(browser, "#all-gates")[0]
    drag = ActionChains(browser).move_to_element(slider).click_and_hold()
    drag.move_by_offset(slider.size["width"] // 2, 0).release().perform()
    settle(browser)
    assert text(browser, "#all-gates-value") == "1.00"
    assert maps_on(browser, 2, 3, 5)["mixture"] == maps_on(browser, 2, 3, 5)["position"]


def test_a_finger_asks_and_reads(opened):
    browser = opened(CONFIG)
    appear(browser, 400)
    point(browser, 2, 4, "touchStart")
    point(browser, 2, 4, "touchEnd")
    assert "row 2, column 4 asks" in asking(browser)
    point(browser, 3, 3, "touchStart", css="#heads article .map")
    assert "row 3, column 3" in asking(browser)
    point(browser, 3, 3, "touchEnd", css="#heads article .map")


def press(browser, *keys):
    from selenium.webdriver import ActionChains, Keys

    chain = ActionChains(browser)
    for key in keys:
        chain.send_keys(getattr(Keys, key))
    chain.perform()
    settle(browser)


def test_the_keyboard_reaches_everything_and_shows_where_it_is(opened):
    browser = opened(CONFIG, history=history_of(CONFIG))
    leave(browser)
    visited = []
    for _ in range(60):
        browser.switch_to.active_element.send_keys("\ue004")  # Tab
        visited.append(
            browser.execute_script(
                """const at = document.activeElement;
                if (at === document.body) return null;
                const seen = at.matches(".choice input") ? at.nextElementSibling : at;
                const {outlineStyle, outlineWidth} = getComputedStyle(seen);
                return [at.id || at.name || at.ariaLabel || at.textContent,
                        outlineStyle === "solid" ? parseFloat(outlineWidth) : 0];"""
            )
        )
        if visited[-1] is None:
            break
    names = [name for name, _ in filter(None, visited)]
    assert all(width >= 2 for _, width in filter(None, visited)), visited
    sliders = [
        f"{knob} of head {h}" for h in (1, 2, 3, 4) for knob in ("gate", "locality strength")
    ]
    expected = ["Content alone", "images", "picture", "over", "layers", *sliders]
    expected += ["all-gates", "all-factors", "reset", "epoch"]
    assert [name for name in names if name in expected] == expected


def test_the_keyboard_turns_everything(opened):
    browser = opened(CONFIG, history=history_of(CONFIG))
    leave(browser)
    picture = find(browser, "#picture")[0]
    picture.send_keys("")
    press(browser, "ARROW_UP", "ARROW_RIGHT", "ARROW_RIGHT", "ARROW_RIGHT")
    assert "row 1, column 5 asks" in asking(browser)
    from selenium.webdriver import ActionChains, Keys

    ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ARROW_DOWN).key_up(
        Keys.SHIFT
    ).perform()
    settle(browser)
    assert "row 1, column 5 asks. It gives to row 2, column 5" in asking(browser)
    press(browser, "ESCAPE")
    assert "gives" not in asking(browser)
    browser.execute_script("document.querySelector('#heads input.gate').focus()")
    press(browser, "HOME")
    assert "gate 0.00" in text(browser, "#heads article")
    press(browser, "ARROW_RIGHT")
    assert "gate 0.01" in text(browser, "#heads article")
    browser.execute_script("document.querySelector('#layers input:checked').focus()")
    press(browser, "ARROW_RIGHT")
    assert "Layer 4 is MHSA" in text(browser, "#layer-help")
    browser.execute_script("document.querySelector('#ask-token').focus()")
    press(browser, "SPACE")
    assert asking(browser).startswith("The class token asks")
    browser.execute_script("document.querySelector('#reset').focus()")
    press(browser, "ENTER")
    choose(browser, "#layers label:nth-of-type(3) input")
    assert "gate 0.00" not in text(browser, "#heads article")


# Everybody can read it.


def test_every_control_has_a_name(opened):
    browser = opened(CONFIG, history=history_of(CONFIG))
    controls = find(browser, "button, input, select, a[href], #picture, .heads-map")
    assert len(controls) > 30
    live = find(browser, "output, [role=status], [aria-live]")  # what a screen reader reads aloud
    assert [node.get_attribute("id") for node in live] == ["tour-text", "query", "verdict"]
    assert [
        control.get_attribute("outerHTML") for control in controls if not control.accessible_name
    ] == []


CONTRASTS = """
const rgb = (colour) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = (colour) => {
  const linear = colour.slice(0, 3).map((v) => v / 255).map(
    (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
  if (node.closest("script, noscript, .unseen, :disabled, input:disabled + span")) continue;
  let below = node;
  while (rgb(getComputedStyle(below).backgroundColor)[3] < 255) below = below.parentElement;
  const style = getComputedStyle(node);
  const colour = node.closest("svg") ? style.fill : style.color;
  const [a, b] = [light(rgb(colour)), light(rgb(getComputedStyle(below).backgroundColor))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  found.push([ratio, parseFloat(style.fontSize), node.textContent.slice(0, 40)]);
}
return found;
"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_text_is_large_and_stands_out_and_fits(dark, width, opened):
    browser = opened(CONFIG, history=history_of(CONFIG), classes=[80 * "w" for _ in range(5)])
    appear(browser, width, dark)
    settle(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    found = browser.execute_script(CONTRASTS)
    assert len(found) > 80
    assert [text for ratio, size, text in found if ratio < 4.5 or size < 12] == []
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 100) == dark


def test_nothing_moves_for_who_wants_no_motion(opened):
    browser = opened(CONFIG)
    durations = """return [...document.querySelectorAll("*")].map(
        (node) => getComputedStyle(node)).map((s) => [s.transitionDuration, s.animationName])"""
    assert ["0.15s", "none"] in browser.execute_script(durations)
    appear(browser, still=True)
    assert {tuple(pair) for pair in browser.execute_script(durations)} == {("0s", "none")}

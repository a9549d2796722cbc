"""The page to draw on: what it answers, and a headless browser whose mouse draws on it."""

import importlib.util
import shutil
import threading

import keras
import numpy as np
import pytest
from script_files import import_script

from farhox import export, meta

pytest.importorskip("flask", reason="Flask is not installed: pip install '.[demo]'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None,
    reason="There is no Chromium to draw with, or playwright is not installed: pip install '.[browser]'")
# Lines through points of the unit square: characters that differ.
CHARACTERS = {
    "ring": [[(0.5 + 0.35 * np.cos(angle), 0.5 + 0.35 * np.sin(angle)) for angle in np.linspace(0, 2 * np.pi, 17)]],
    "cross": [[(0.15, 0.5), (0.85, 0.5)], [(0.5, 0.15), (0.5, 0.85)]],
    "corner": [[(0.2, 0.15), (0.2, 0.85), (0.8, 0.85)]],
    "slash": [[(0.8, 0.15), (0.2, 0.85)]],
    "hook": [[(0.2, 0.2), (0.8, 0.2), (0.8, 0.8)]],
}


@pytest.fixture(scope="module")
def learner():
    """Compares blurred drawings with each other, which takes no training."""
    body = keras.Sequential([keras.Input([28, 28, 1]), keras.layers.AveragePooling2D(4), keras.layers.Flatten(),
                             keras.layers.Rescaling(3.0)])
    return meta.PrototypicalNetwork(body, ways=5)


@pytest.fixture
def app(learner, tmp_path, monkeypatch):
    export.saved_model(learner, tmp_path / "drawn")
    return import_script("draw_page", monkeypatch).make_app(export.load(tmp_path / "drawn"))


def test_the_page_asks_the_adapted_learner_and_says_what_it_cannot_answer(app, learner):
    client, random = app.test_client(), np.random.default_rng(0)
    page = client.get("/").get_data(as_text=True)
    assert "WAYS = 5, SIDE = 28" in page and "{{" not in page
    support, query = random.random((3, 784)), random.random(784)
    asked = {"support": support.tolist(), "labels": [0, 2, 4], "query": query.tolist()}
    answer = client.post("/answer", json=asked)
    expected = learner.predict((support.reshape(3, 28, 28, 1), np.array([0, 2, 4])), query.reshape(1, 28, 28, 1))[0]
    assert answer.status_code == 200
    np.testing.assert_allclose(answer.json["probabilities"], expected, atol=1e-5)
    for changes, text in (({"query": [0.5] * 783}, "drawings of 784 numbers"), ({"query": None}, "drawings of 784"),
                          ({"labels": [0, 2, 5]}, "support_labels must be integers from 0 to 4"),
                          ({"labels": [0, 2]}, "with as many of support as in support_inputs")):
        answer = client.post("/answer", json={**asked, **changes})
        assert answer.status_code == 400 and text in answer.json["error"]
    assert client.post("/answer", json={"support": []}).status_code == 400


@needs_browser
@pytest.mark.slow
def test_a_mouse_draws_five_characters_and_a_new_one_is_known_while_it_is_drawn(app):
    from playwright.sync_api import expect, sync_playwright
    from werkzeug import serving
    server = serving.make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page()
            errors = []
            page.on("pageerror", lambda error: errors.append(error))
            page.goto(f"http://127.0.0.1:{server.port}/")
            answer = page.locator("#answer")
            expect(answer).to_have_text("Draw two or more examples.")
            for number, character in enumerate(CHARACTERS.values(), start=1):
                draw(page, f"#example{number}", character)
            expect(answer).to_have_text("Draw a new character.")
            for number, character in enumerate(CHARACTERS.values(), start=1):
                page.click("#again")
                expect(answer).to_have_text("Draw a new character.")
                # As a person draws it: somewhat smaller, in another place, not quite as straight.
                draw(page, "#query", [[(0.1 + 0.7 * x + 0.03 * np.sin(9 * y), 0.15 + 0.7 * y) for x, y in points]
                                      for points in character], lift=False)
                expect(answer).to_contain_text(f"{number}, ")  # The button of the mouse is still down.
                page.mouse.up()
                sure = int(page.locator(".first .share").inner_text().split()[0])
                assert f"{sure} % sure" in answer.inner_text() and 50 < sure <= 100
                assert page.locator(".first > span").first.inner_text() == str(number)
            page.locator("figure:has(#example3) button").click()
            draw(page, "#query", [[(0.5, 0.5)]])
            expect(page.locator(".share").nth(2)).to_have_text("–")  # What has no example is no answer.
            assert not errors
            browser.close()
    finally:
        server.shutdown()
        thread.join()


def draw(page, selector, character, lift=True):
    """Draws lines with the mouse; the last one is left open if it is not to be lifted."""
    box = page.locator(selector).bounding_box()
    for number, points in enumerate(character):
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=4)
        if lift or number + 1 < len(character):
            page.mouse.up()

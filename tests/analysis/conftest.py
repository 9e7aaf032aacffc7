"""A browser for the page of `inspect`."""

import shutil

import pytest


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window, driven over WebDriver; browser.open(path) shows a file."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.support.wait import WebDriverWait

    chrome = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chrome and driver):
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))

    def open_file(path):
        browser.get(path.as_uri())
        is_there = "return location.href === arguments[0] && document.readyState === 'complete'"
        WebDriverWait(browser, 60).until(lambda _: browser.execute_script(is_there, path.as_uri()))

    browser.open = open_file
    yield browser
    browser.quit()

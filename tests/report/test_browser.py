"""The page in headless Chromium. The tests are skipped without Chromium or playwright."""

import re
import shutil
from pathlib import Path

import pytest

from vit_jax.report.build import report_comparison, report_run
from vit_jax.report.experiment import report_experiment
from vit_jax.report.page import write_page

MINIATURE = Path(__file__).parents[2] / 'results' / 'mini_pooling.csv'
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
ARGUMENTS = [
  '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
  '--disable-background-networking', '--disable-component-update',
]  # fmt: skip
# The texts inside charts are drawn on a canvas; each chart has a text alternative.
SIZES = {'desk': (1200, 900), 'phone': (390, 800)}


@pytest.fixture(scope='module')
def browser():
  """Return a browser, or skip the tests."""
  playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
  if not CHROMIUM:
    pytest.skip('Chromium is not installed')
  with playwright.sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
    yield browser
    browser.close()


@pytest.fixture(scope='module')
def files(hostile_run, tmp_path_factory) -> dict[str, Path]:
  """Return the pages of a run, of two runs and of a miniature."""
  folder = tmp_path_factory.mktemp('pages')
  other = folder / 'other'
  shutil.copytree(hostile_run, other)
  write_page(report_run(hostile_run), folder / 'run.html')
  write_page(report_comparison([hostile_run, other]), folder / 'runs.html')
  write_page(report_experiment(MINIATURE), folder / 'experiment.html')
  return {name: folder / f'{name}.html' for name in ('run', 'runs', 'experiment')}


class Visit:
  """A page in the browser, and what went wrong there."""

  def __init__(self, browser, file: Path, *, dark: bool = False, size: str = 'desk'):
    width, height = SIZES[size]
    scheme = 'dark' if dark else 'light'
    self.page = browser.new_page(color_scheme=scheme, viewport={'width': width, 'height': height})
    self.problems = []
    self.page.on('console', self._on_console)
    self.page.on('pageerror', lambda error: self.problems.append(str(error)))
    self.page.on('dialog', lambda dialog: self.problems.append(f'dialog {dialog.message}'))
    self.page.on('request', self._on_request)
    self.page.goto(file.as_uri())
    self._own = file.as_uri()
    self.page.wait_for_function('Bokeh.documents.length && Bokeh.documents.every((d) => d.is_idle)')

  def _on_console(self, message):
    if message.type in ('error', 'warning'):
      self.problems.append(message.text)

  def _on_request(self, request):
    if not request.url.startswith(('data:', 'blob:', 'file:')):
      self.problems.append(f'request {request.url}')

  def column(self, index: int) -> list[str]:
    """Return the texts of a column of the table of classes."""
    return self.page.locator('.sortable tbody tr').evaluate_all(
      f'(rows) => rows.map((row) => row.cells[{index}].textContent)'
    )

  def pixels(self, name: str) -> str:
    """Return the contents of a canvas."""
    return self.page.evaluate(f'document.getElementById("{name}").toDataURL()')

  def close(self):
    """Close the page. Raise AssertionError if anything went wrong there."""
    self.page.close()
    assert not self.problems


@pytest.fixture
def visit(browser):
  """Return a function that opens a page, and check at the end that nothing went wrong in it."""
  visits = []

  def open_page(file: Path, **options) -> Visit:
    visits.append(Visit(browser, file, **options))
    return visits[-1]

  yield open_page
  for each in visits:
    each.close()


@pytest.mark.parametrize('name', ['run', 'runs'])
@pytest.mark.parametrize('dark', [False, True])
@pytest.mark.parametrize('size', SIZES)
def test_pages_are_accessible_and_fit_the_width(visit, files, name, dark, size):
  axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
  page = visit(files[name], dark=dark, size=size).page
  found = axe.run(page).response['violations']
  shown = [(each['id'], [node['html'][:200] for node in each['nodes'][:3]]) for each in found]
  assert not shown
  assert page.evaluate('document.documentElement.scrollWidth') <= SIZES[size][0]


def test_charts_are_drawn_and_show_values_on_hover(visit, files, hostile_run):
  page = visit(files['run']).page
  plot = page.locator('.plot').first
  canvas = plot.locator('canvas').first
  canvas.scroll_into_view_if_needed()
  box = canvas.bounding_box()
  # One color would mean that nothing is drawn.
  colors = canvas.evaluate(
    '(c) => new Set(c.getContext("2d").getImageData(0, 0, c.width, c.height).data).size'
  )
  assert colors > 10
  x, y, step, value = page.evaluate(
    """(() => {
      const view = Bokeh.index.roots[0], data = view.model.renderers[0].data_source.data;
      const [step, value] = [data.step[1], data.value[1]];
      return [view.frame.x_scale.compute(step), view.frame.y_scale.compute(value), step, value];
    })()"""
  )
  page.mouse.move(box['x'] + x, box['y'] + y)
  tooltip = page.locator('.bk-tooltip-content')
  tooltip.first.wait_for()
  text = tooltip.first.inner_text()
  assert re.search(rf'step:?\s*{step}\b', text) and f'{value:.4f}'[:-1] in text
  assert hostile_run.name in text


def test_headings_sort_up_and_down_and_leave_missing_numbers_last(visit, files):
  opened = visit(files['run'])
  header = opened.page.locator('.sortable thead th').nth(2)  # Recall: every class has one.
  numbers = lambda: [float(text.rstrip('%')) for text in opened.column(2)]
  header.locator('button').click()
  assert header.get_attribute('aria-sort') == 'descending'
  assert numbers() == sorted(numbers(), reverse=True)
  header.locator('button').focus()
  opened.page.keyboard.press('Enter')
  assert header.get_attribute('aria-sort') == 'ascending'
  assert numbers() == sorted(numbers())
  precision = opened.page.locator('.sortable thead th').nth(1)
  for _ in range(2):
    precision.locator('button').click()
    missing = [text == '-' for text in opened.column(1)]
    assert missing == sorted(missing)
  opened.page.locator('.sortable thead th').nth(0).locator('button').click()
  names = opened.column(0)
  assert names == opened.page.evaluate('(x) => [...x].sort((a, b) => a.localeCompare(b))', names)


def test_a_cell_of_the_confusion_matrix_shows_its_images(visit, files):
  page = visit(files['run']).page
  cell = page.locator('.matrix .cell').first
  count, label = cell.get_attribute('data-count'), cell.get_attribute('data-label')
  cell.focus()
  page.keyboard.press('Enter')
  assert cell.get_attribute('aria-pressed') == 'true'
  images = page.locator('#cell-images img')
  assert images.count() == min(8, int(count))
  assert page.locator('#cell-images h3').inner_text().startswith(label)
  images.first.evaluate('(image) => image.decode()')
  assert images.first.evaluate('(image) => image.naturalWidth') > 0


def test_hovering_over_a_patch_changes_the_maps_of_all_heads(visit, files):
  opened = visit(files['run'])
  page, text = opened.page, opened.page.locator('#attention-text')
  page.wait_for_function('document.getElementById("attention-text").textContent')
  page.locator('#attention-view').scroll_into_view_if_needed()
  before, box = opened.pixels('attention-heads'), page.locator('#attention-view').bounding_box()
  page.mouse.move(box['x'] + 0.9 * box['width'], box['y'] + 0.6 * box['height'])
  assert 'From row 3, column 4' in text.inner_text()  # The grid is 4x4.
  assert opened.pixels('attention-heads') != before
  page.locator('#attention-view').focus()
  page.keyboard.press('ArrowLeft')
  page.keyboard.press('ArrowUp')
  assert 'From row 2, column 3' in text.inner_text()
  one_layer = opened.pixels('attention-view')
  page.locator('#attention-layer').select_option(index=0)
  page.locator('#attention-head').select_option(index=2)  # After 'mean' and 1.
  assert opened.pixels('attention-view') != one_layer
  assert 'head 2 of layer 1' in text.inner_text()
  page.locator('#attention-image').select_option(index=1)
  page.wait_for_function(f'document.getElementById("attention-view").toDataURL() !== {one_layer!r}')


def test_dark_pages_have_light_texts_in_charts_too(visit, files):
  luminance = """(color) => {
    const context = document.createElement('canvas').getContext('2d');
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return context.getImageData(0, 0, 1, 1).data[0];
  }"""
  for dark in (False, True):
    page = visit(files['run'], dark=dark).page
    back = page.evaluate('getComputedStyle(document.body).backgroundColor')
    page.wait_for_function("""[...Bokeh.documents[0]._all_models.values()].some(
      (m) => m.type === 'LinearAxis' && m.axis_label_text_color !== '#444444')""")
    label = page.evaluate(
      """[...Bokeh.documents[0]._all_models.values()]
      .find((m) => m.type === 'LinearAxis').axis_label_text_color"""
    )
    is_light = [page.evaluate(luminance, color) > 128 for color in (back, label)]
    assert is_light == [not dark, dark]


def test_hostile_names_run_nothing_and_are_shown(visit, files, hostile_run):
  page = visit(files['run']).page
  assert page.locator('h1').inner_text() == hostile_run.name
  for i in range(page.locator('.cell').count()):
    page.locator('.cell').nth(i).click()
  assert page.locator('#cell-images .name').first.inner_text().endswith('.jpg')
  assert page.locator('[onerror], [onclick]').count() == 0
  page = visit(files['runs']).page
  assert hostile_run.name in page.locator('.compare thead').first.inner_text()

"Everything that is to be known about the package stands in settings.ini; this file passes it on."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']


class Sdist(sdist):
    "An sdist that carries settings.ini, which this file reads"
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        self.copy_file(str(here/'settings.ini'), base_dir)


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={cfg['lib_name']: ['weights/**/*']},
    install_requires=shlex.split(cfg['requirements']),
    extras_require={
        'dev': shlex.split(cfg['dev_requirements']),
        # the cache of others that the page peers compares with
        'peers': shlex.split(cfg['peers_requirements']),
    },
    entry_points={
        'console_scripts': shlex.split(cfg['console_scripts']),
        'nbdev': [f'{cfg["lib_name"]}={cfg["lib_path"]}._modidx:d'],
    },
    cmdclass={'sdist': Sdist},
    zip_safe=False,
)

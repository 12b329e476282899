"""This package inside other people's libraries: each part needs the library that it is named after."""

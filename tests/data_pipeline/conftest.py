from tests.data.conftest import raw_data_set as raw_data_set

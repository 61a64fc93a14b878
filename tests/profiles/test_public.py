import medusa_profiles


def test_all_public_names_exist():
    for name in medusa_profiles.__all__:
        assert hasattr(medusa_profiles, name)

"""`accelerate launch -m fewstep.app evaluate ...`: the same as `fewstep evaluate`, on several devices."""

from fewstep.app.main import main

if __name__ == "__main__":
    main()

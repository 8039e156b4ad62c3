"""Lists of words that the rules of a good bank look up."""

# Words for what nobody can point at in a picture, and praise that only sounds like a description.
NON_VISUAL = frozenset("""
    aggressive aromatic beautiful behaviour bitter call characteristic cute delicious diet distinctive eat elegant
    endangered energetic expensive famous fragrant friendly gentle habitat healthy iconic intelligent live loud loyal
    melodic migratory native nocturnal noisy nutritious playful popular recognisable savoury scent seasonal smell social
    song sound spicy tasty traditional typical unique vocal
""".split())
# Little words of other languages that are no English words.
FOREIGN = frozenset("""
    au aux avec dans des du et les ses une el los las una unos con del der das und mit dem ein eine eines auf schwarze
    il lo gli di della dello nero com dos uma een het og och med
""".split())
# Words by which a name itself describes a look: "red wing patch" gives nothing away about a "Red-winged Blackbird".
LOOKS = frozenset("""
    a an and at by for from in its of on or the to with
    red orange yellow green blue purple violet pink brown black white grey gold golden silver scarlet crimson rose ruby
    olive chestnut rufous buff cream dark light pale bright big large great small little long short broad thick thin
    round flat pointed sharp forked hooked curved spotted striped barred banded streaked crested tufted horned webbed
    crown cap head face eye ear cheek chin throat neck collar nape beak breast chest belly flank back wing shoulder rump
    tail leg foot toe claw feather fur hair coat mane paw nose horn fin scale shell spot stripe bar band ring
""".split())
# The most frequent words of the shipped banks, less those that other languages share ("long", "orange", "plate"). A
# list of descriptions in English holds some of them in nearly every phrase.
ENGLISH = frozenset("""
    abdomen above across along amber and antennae arched around back banded bar bare barred barrel beak beard before
    behind bell belly below beneath beside between bib black blackish blade blaze block blue blunt body bold border
    bottle bottom bow bowl box brand brass breast bright bristly broad broth brow brown browned buff bulging bushy
    button cab cable carved case centre cheek cheese chest chestnut chin chopped circular claw clean clear coat coiled
    collar coloured column cone conical cord corner cream creamy crescent cross crown crumb crust cup curled curved
    cut cylindrical dark deck deep dial dish display docked dome domed door dot double down drooping dull dusky ear
    edge edged egg end erect eye eyebrow fabric fan fawn feather feathered filling fine finger flank flap flared flat
    flattened flesh floor fluffy fold folded folding foot forehead foreleg forked four frame fringe fringed front fur
    furry gap glass glossy golden green greenish grey grid grip groove hair haired handle hanging head heap heavy hem
    high hind hinged hole hood hook hooked horizontal horn huge hull inner inside iron jaw key knob label large layer
    leaf leather leg lemon lettering lid light like line lip liquid logo loop loose low lower mane mark meat melted
    mesh mottled moustache mouth muzzle nape narrow near neck nose notched nozzle number of olive open opening or out
    outer overhead overlapping pad padded painted pair paired pale panel paper parallel patch pattern paw piece pink
    pinkish plain plastic plume plumed pocket pointed pool post pouch printed protruding pull purple push rail raised
    rear rectangular red reddish ribbed ridge ridged rim rimmed ringed rod rope rough round rounded row rubber ruff
    rufous rump rust rusty saddle scale screw seam seat section seed set shaft shaggy shaped sharp shell shiny short
    shoulder side silky silvery single skin skull slanted slate sleeve slender slice slit sloping slot small smooth
    snout soft solid speckled spine spiny split spot spotted square stacked stalk stand steel stem stick stitched
    stone stout straight strand strap streak streaked string strip stripe striped stubby sturdy surface tail tall tan
    tapered tapering the thick thigh thin thorax thread throat through tiny tip tipped toe tomato toothed top tower
    translucent tray triangular tuft two tyre underneath underside undertail unmarked unstreaked up upper upright
    upturned vertical very waist wall water wavy webbed wedge wheel whisker white whitish wide window windscreen wing
    wingbar wingtip wire with wooden wrinkled yellow yellowish
""".split())

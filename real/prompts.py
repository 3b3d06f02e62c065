"""What the real model is asked: everyday requests, and plain questions with exact answers.

Written for this repository, so that the run needs nobody's data. real/prepare.py adds the checkable
instructions and splits training from held-out.
"""

# fmt: off
REQUESTS = {
    "How does {} work?": [
        "a bicycle pump", "a microwave oven", "a fridge", "a zipper", "a compass",
        "a pressure cooker", "a touch screen", "a thermometer", "a sewing machine",
        "a vending machine", "a lighthouse", "a sundial", "a water wheel", "a solar panel",
        "a hearing aid", "a lock with a key", "an elevator", "a parachute", "a pinhole camera",
        "a greenhouse", "a vacuum cleaner", "a metal detector", "a smoke alarm", "a ballpoint pen",
        "a toaster", "a seat belt", "noise cancelling", "a barcode", "a hot air balloon",
        "a steam engine", "a telescope", "an umbrella", "a piano", "a traffic light",
        "a library catalogue", "a public auction", "a credit card", "a search engine",
        "a spell checker", "the water cycle",
    ],
    "How can I {}?": [
        "sleep better at night", "learn to juggle", "remember people's names", "save money on food",
        "become a better listener", "keep my houseplants alive", "stop biting my nails",
        "prepare for a job interview", "make friends in a new city", "read more books",
        "calm down before an exam", "train my dog to sit", "teach my child to ride a bike",
        "reduce plastic waste at home", "clean a burnt pan", "remove a coffee stain from a shirt",
        "write a good thank-you note", "start running as a beginner", "improve my handwriting",
        "learn basic Spanish", "keep cut flowers fresh", "organise a small kitchen",
        "spend less time on my phone", "become more patient", "pack a suitcase well",
        "fix a squeaky door", "get rid of fruit flies", "help a friend who is sad",
        "speak in front of a crowd", "plan a cheap weekend trip", "grow tomatoes on a balcony",
        "learn to swim as an adult", "keep a diary every day", "wake up early without an alarm",
        "choose a good bicycle", "protect my password", "make my home warmer in winter",
        "get a baby to fall asleep", "stay healthy while working at a desk",
        "learn the guitar alone", "thank my teacher", "throw a surprise party",
        "mend a hole in a sock", "store potatoes", "save energy at home",
        "avoid getting lost in a forest", "make a boring meeting shorter", "keep bread fresh",
        "say no politely", "take better photos with a phone",
    ],
    "How do I make {}?": [
        "pancakes", "vegetable soup", "iced tea", "a paper boat", "scrambled eggs", "apple pie",
        "lemonade", "a simple salad", "mashed potatoes", "a birthday card", "fried rice",
        "hot chocolate", "tomato sauce", "a fruit smoothie", "a bird feeder", "garlic bread",
        "a snow man", "popcorn", "an omelette", "a budget", "a sandwich", "a packing list",
        "a kite", "oatmeal", "a puppet", "rice pudding", "a campfire", "a scarecrow",
        "banana bread", "a study plan",
    ],
    "What is the difference between {}?": [
        "a frog and a toad", "weather and climate", "a lake and a pond", "jam and jelly",
        "a cold and the flu", "a novel and a short story", "a comet and an asteroid",
        "a butterfly and a moth", "a guitar and a violin", "a debit card and a credit card",
        "fruit and vegetables", "a hill and a mountain", "tea and coffee", "a bus and a tram",
        "a crocodile and an alligator", "a poem and a song", "a city and a town", "rain and snow",
        "a biography and an autobiography", "an opinion and a fact", "a king and a president",
        "bacteria and viruses", "butter and margarine", "a violin and a cello", "a hobby and a job",
    ],
    "Why {}?": [
        "do leaves change colour in autumn", "is the sky blue", "do cats purr", "do we yawn",
        "is the sea salty", "do onions make us cry", "do birds fly south", "do we dream",
        "is sleep important", "do bees make honey", "does ice float on water", "do people laugh",
        "do we have seasons", "do dogs wag their tails", "is breakfast important",
        "do stars twinkle", "do we need vaccines", "do some people fear spiders",
        "is exercise good for the heart", "do trees have bark", "do we shake hands",
        "does bread rise", "is recycling useful", "do camels have humps",
        "do we celebrate birthdays", "does the moon change its shape", "do plants need light",
        "does music make us feel good", "do volcanoes erupt", "do languages change over time",
    ],
    "Write {}.": [
        "a short story about a lost key", "a poem about the sea", "a note to a new neighbour",
        "an email asking for a day off", "a description of a quiet village",
        "a review of a small cafe", "an invitation to a garden party",
        "a story about a brave mouse", "a letter to a grandmother", "a poem about winter",
        "an apology for being late", "a description of a busy market",
        "an advertisement for a used bicycle", "a story that takes place on a train",
        "a message to a sick friend", "a speech for a wedding", "a description of a dragon",
        "a welcome message for a book club", "a diary entry of a sailor",
        "a poem about an old house", "a story about two friends and a boat",
        "a note for a lost cat", "a letter to the mayor", "a bedtime story about the moon",
        "an email to cancel a meeting", "a poem about bread", "a short speech for a retirement",
        "a description of a thunderstorm", "a product text for a warm blanket",
        "a story about a robot who paints",
    ],
    "Suggest {}.": [
        "a gift for a ten-year-old", "names for a grey kitten", "things to do on a rainy day",
        "a healthy snack for school", "games for a long car trip", "a topic for a science project",
        "ways to use old newspapers", "activities for a family picnic",
        "a menu for a summer dinner", "hobbies for an older person",
        "questions for a first meeting", "a name for a bakery", "places to visit in a big city",
        "exercises for a sore back", "a theme for a party", "ideas for a school garden",
        "ways to learn new words", "decorations for a small room", "things to bring to a beach",
        "a plan for a lazy Sunday", "ways to cheer up a colleague", "a quick meal with eggs",
        "good habits for the morning", "a motto for a sports team", "ways to save water",
    ],
    "Tell me about {}.": [
        "penguins", "the planet Mars", "the history of chess", "coral reefs", "the Sahara desert",
        "honey bees", "the invention of printing", "polar bears", "the Great Wall of China",
        "dolphins", "the life of a salmon", "the moon landing", "elephants", "the Olympic Games",
        "coffee", "the Amazon river", "owls", "the human heart", "rice farming",
        "the invention of the wheel", "whales", "the pyramids", "the human brain", "glaciers",
        "spiders", "the northern lights", "the violin", "chocolate", "wolves",
        "the history of the bicycle",
    ],
    "What are the advantages of {}?": [
        "living in a small town", "working from home", "riding a bicycle to work",
        "reading every day", "learning a second language", "cooking at home", "having a pet",
        "using public transport", "paper books", "drinking water", "team sports", "a garden",
        "wooden toys", "walking", "school uniforms", "renting a home", "early rising",
        "a shared flat", "playing an instrument", "keeping a budget",
    ],
}

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Cuba": "Havana",
    "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Ireland": "Dublin",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Hungary": "Budapest", "Canada": "Ottawa", "Australia": "Canberra", "Peru": "Lima",
    "Kenya": "Nairobi", "Thailand": "Bangkok", "Belgium": "Brussels", "Iraq": "Baghdad",
    "Iran": "Tehran", "Chile": "Santiago", "South Korea": "Seoul", "the United Kingdom": "London",
}
OPPOSITES = {
    "hot": "cold", "big": ["small", "little"], "fast": "slow", "up": "down",
    "light": ["dark", "heavy"], "happy": ["sad", "unhappy"], "hard": ["soft", "easy"], "wet": "dry",
    "old": ["young", "new"], "rich": "poor", "open": ["closed", "close", "shut"], "loud": "quiet",
    "strong": "weak", "early": "late", "clean": "dirty", "near": "far", "push": "pull",
    "left": "right", "win": "lose", "day": "night", "black": "white", "full": "empty",
    "true": "false", "buy": "sell", "love": "hate",
}
FACTS = {
    "How many days are in a week?": ["7", "seven"],
    "How many months are in a year?": ["12", "twelve"],
    "How many minutes are in an hour?": ["60", "sixty"],
    "How many hours are in a day?": ["24", "twenty-four"],
    "How many legs does a spider have?": ["8", "eight"],
    "How many legs does an insect have?": ["6", "six"],
    "How many sides does a triangle have?": ["3", "three"],
    "How many sides does a hexagon have?": ["6", "six"],
    "How many continents are there?": ["7", "seven"],
    "How many planets are in the solar system?": ["8", "eight"],
    "How many letters are in the English alphabet?": ["26", "twenty-six"],
    "How many wheels does a bicycle have?": ["2", "two"],
    "How many cents are in a dollar?": ["100", "hundred"],
    "How many players are in a football (soccer) team on the field?": ["11", "eleven"],
    "At how many degrees Celsius does water boil?": ["100", "hundred"],
    "At how many degrees Celsius does water freeze?": ["0", "zero"],
    "What is the largest ocean on Earth?": "Pacific",
    "What is the largest planet in the solar system?": "Jupiter",
    "Which planet is closest to the sun?": "Mercury",
    "Which planet is known as the red planet?": "Mars",
    "What is the tallest mountain on Earth?": "Everest",
    "What is the largest animal on Earth?": ["blue whale", "whale"],
    "Which animal is known as the king of the jungle?": "lion",
    "What is the fastest animal on land?": "cheetah",
    "What do bees make?": "honey",
    "What gas do plants take in from the air?": ["carbon dioxide", "CO2"],
    "What gas do humans need to breathe?": "oxygen",
    "What is the chemical symbol of gold?": "Au",
    "What is the chemical symbol of oxygen?": "O",
    "What is the chemical formula of water?": ["H2O", "H₂O"],
    "What is frozen water called?": "ice",
    "What star is at the centre of the solar system?": "sun",
    "What colour is a banana?": "yellow",
    "What colour is grass?": "green",
    "What colour is snow?": "white",
    "What colour do you get when you mix blue and yellow?": "green",
    "What colour do you get when you mix red and white?": "pink",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "Who painted the Mona Lisa?": ["Leonardo", "da Vinci"],
    "Who developed the theory of relativity?": "Einstein",
    "Who was the first president of the United States?": "Washington",
    "Who was the first person to walk on the moon?": "Armstrong",
    "Who wrote Hamlet?": "Shakespeare",
    "Who wrote The Origin of Species?": "Darwin",
    "Who discovered penicillin?": "Fleming",
    "In which country is the Eiffel Tower?": "France",
    "In which country are the pyramids of Giza?": "Egypt",
    "In which country is the Taj Mahal?": "India",
    "In which country is the Great Wall?": "China",
    "On which continent is Kenya?": "Africa",
    "On which continent is Brazil?": "South America",
    "On which continent is Japan?": "Asia",
    "On which continent is Spain?": "Europe",
    "Which language is spoken in Brazil?": "Portuguese",
    "Which language is spoken in Mexico?": "Spanish",
    "Which language is spoken in Austria?": "German",
    "What is the currency of Japan?": "yen",
    "What is the currency of the United States?": "dollar",
    "What is the currency of the United Kingdom?": ["pound", "sterling"],
    "What is the currency of India?": "rupee",
    "What season comes after summer?": ["autumn", "fall"],
    "What season comes after winter?": "spring",
    "What day comes after Monday?": "Tuesday",
    "What day comes before Sunday?": "Saturday",
    "What month comes after June?": "July",
    "What month comes before April?": "March",
    "What is the first month of the year?": "January",
    "What is a baby dog called?": ["puppy", "pup"],
    "What is a baby cat called?": "kitten",
    "What is a baby cow called?": "calf",
    "What is a baby sheep called?": "lamb",
    "What is the plural of mouse?": "mice",
    "What is the plural of child?": "children",
    "What is the past tense of go?": "went",
    "What is the past tense of eat?": "ate",
    "What is the largest organ of the human body?": "skin",
    "What organ pumps blood through the body?": "heart",
    "What organ do we use to think?": "brain",
    "What do we call a doctor for teeth?": "dentist",
    "What do we call a person who flies a plane?": "pilot",
    "What do we call a person who bakes bread?": "baker",
    "What instrument has 88 keys?": "piano",
    "What is the hardest natural material?": "diamond",
    "What metal is liquid at room temperature?": "mercury",
    "What is the main ingredient of bread?": "flour",
    "What fruit is raisin made of?": ["grape", "grapes"],
    "What is cheese made from?": "milk",
    "What vegetable makes people cry when they cut it?": ["onion", "onions"],
}
# fmt: on


def requests():
    """All requests, in the order of the tables."""
    texts = []
    for frame, topics in REQUESTS.items():
        for topic in topics:
            texts.append(frame.format(topic))
    return texts


def questions():
    """(question, answer) pairs; an answer that is a list has several right wordings."""
    pairs = []
    for country, city in CAPITALS.items():
        pairs.append((f"What is the capital of {country}?", city))
    for word, opposite in OPPOSITES.items():
        pairs.append((f"What is the opposite of {word}?", opposite))
    for a in range(2, 10):
        for b in (3, 4, 5):
            pairs.append((f"What is {a} plus {b}?", str(a + b)))
    for a in (2, 3, 5, 10):
        for b in (4, 6, 7):
            pairs.append((f"What is {a} times {b}?", str(a * b)))
    pairs += FACTS.items()
    return pairs
